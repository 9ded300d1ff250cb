//! NF4 on the device: launchers.
