//! Weights as the run holds them: NF4 or as stored, decided by module name, and counted.
