"""What a run did: the recorder that writes it down, and the report that shows it."""
