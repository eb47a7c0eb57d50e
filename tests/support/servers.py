"""Real HTTP/2 servers from wheels, in processes of their own."""
