"""Measurements of attention: its time, beside its peers, and the contract of exactness that every back end keeps."""
