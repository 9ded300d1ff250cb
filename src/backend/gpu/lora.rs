//! The low-rank pairs of projections: launchers.
