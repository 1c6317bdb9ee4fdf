"""Muon, AdamW, balancing controller and the table that assigns parameters to them."""
