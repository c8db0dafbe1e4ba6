"""`gemmakit serve`: one engine behind the HTTP routes that clients of OpenAI and Anthropic speak."""
