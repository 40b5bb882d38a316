//! OCI images: pulled, verified, unpacked, kept.
