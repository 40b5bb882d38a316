//! Spans, which give the ids of a pod and a container to every log line that is about
//! them.
//!
//! An RPC has a span, and so has each task that works for a pod or a container beside
//! the RPCs. Their level is that of the gravest lines: wherever a line is shown, its ids
//! are. Under a filter that shows no line, they cost nothing.

use husk_base::id::{ContainerId, SandboxId};
use tracing::field::{Empty, display};
use tracing::{Span, error_span};

/// The span of an RPC. What the RPC is about is noted as soon as it is known.
#[must_use]
pub fn rpc(name: &str) -> Span {
    error_span!(parent: None, "rpc", rpc = %name, sandbox = Empty, container = Empty)
}

/// The span of a task that works for a pod.
pub(crate) fn sandbox(id: &SandboxId) -> Span {
    error_span!(parent: None, "pod", sandbox = %id)
}

/// The span of a task that works for a container.
pub(crate) fn container(sandbox: &SandboxId, id: &ContainerId) -> Span {
    error_span!(parent: None, "container", sandbox = %sandbox, container = %id)
}

/// Notes the pod that the present RPC is about.
pub(crate) fn note_sandbox(id: &SandboxId) {
    Span::current().record("sandbox", display(id));
}

/// Notes the container that the present RPC is about. Its pod is noted by itself: a field
/// that is noted twice is shown twice.
pub(crate) fn note_container(id: &ContainerId) {
    Span::current().record("container", display(id));
}
