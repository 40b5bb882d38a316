//! Boots real guests and watches them from outside. Needs KVM, busybox-static,
//! erofs-utils, and a guest kernel named by `HUSK_TEST_KERNEL`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod boot;
mod support;
mod template;
