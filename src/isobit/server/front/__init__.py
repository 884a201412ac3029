"""Servers behind one address, and streams that outlive them."""
