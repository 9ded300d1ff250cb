//! Devices that run the ops.
