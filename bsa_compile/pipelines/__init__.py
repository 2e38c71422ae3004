"""Whole generations, from a prompt to a video. Each family of models is a package of its own."""
