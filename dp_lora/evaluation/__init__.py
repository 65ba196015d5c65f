"""Distances, utility and copies of samples; reads private pictures, so its results stay with the operator."""
