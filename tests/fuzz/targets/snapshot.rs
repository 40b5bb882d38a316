#![no_main]
husk_fuzz::target!(husk_fuzz::snapshot);
