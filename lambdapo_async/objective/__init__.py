"""Pure maths: advantages, policy losses, semantic density, diagnostics (docs/algorithm.md)."""
