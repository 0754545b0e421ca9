"""Other libraries' attention: each module is one implementation, and imports its package when it is called."""
