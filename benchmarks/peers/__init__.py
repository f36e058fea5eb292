"""Other people's engines, each at its best, behind one signature."""
