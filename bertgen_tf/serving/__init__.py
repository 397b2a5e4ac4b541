"""Exports in use: a server, a client, files on Ray, Apache Beam."""
