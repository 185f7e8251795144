"""What makes training fast, without changing what is learned."""
