//! Working sets: which pages of a file a program touches, and reading them before they are missed.
//!
//! The recorders, the modes and the prefetcher come with the working-set work; the schema already has their place
//! (`dyni_schema::working_set`).
