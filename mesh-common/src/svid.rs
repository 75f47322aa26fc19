//! Names and proofs: filled in by the identity work.
