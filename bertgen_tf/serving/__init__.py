"""What answers from exports: a server, a client, files on Ray, Apache Beam."""
