"""The command line: one file a verb. A verb parses, calls, prints; what is heavy is imported when it runs."""
