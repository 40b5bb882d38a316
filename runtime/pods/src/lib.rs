//! Pods and containers of a node: what huskd knows of them, and what can be done
//! with them.
//!
//! [`model`] has the records, the registry and the events; [`ops`] has the
//! operations, each a function of the [`Node`] that reads from top to bottom. A
//! client's interface is somebody else's: whoever has a request in hand, or
//! recovers what an earlier huskd left, calls an operation.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod error;
mod lane;
pub mod model;
mod node;
pub mod ops;
pub mod span;
#[cfg(any(test, feature = "test-util"))]
pub mod test_util;

pub use error::Error;
pub use node::Node;
