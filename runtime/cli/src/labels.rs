//! The labels and annotations by which `husk` knows what it made.

/// Label of a container, and of a pod that was made for one container: the container's name.
pub const NAME: &str = "husk.dev/name";

/// The namespace of pods that `husk` makes.
pub const NAMESPACE: &str = "husk";

/// Annotation of a container: the seconds that `husk stop` gives it.
pub const STOP_TIMEOUT: &str = "husk.dev/stop-timeout";
