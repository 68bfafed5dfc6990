"""Names and rules: what a scheme says, and which tensor gets which."""
