"""Routers score, the chooser chooses. Knows nothing of engines, stores or HTTP."""
