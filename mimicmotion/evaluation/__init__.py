"""Figures of generated videos, and pages of them."""
