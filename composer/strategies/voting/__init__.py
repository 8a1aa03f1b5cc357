"""Parts of the strategy `vote`: answers gathered, counted, and judged. Names no strategy."""
