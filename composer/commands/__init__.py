"""The commands of `composer`, by what they are about. Each reads its options, calls what does the
work, and prints."""
