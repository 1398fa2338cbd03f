"""Recipes: what a run is made from, and the steps that make it."""
