//! The CRI server: one file per verb, and each tells that verb's whole story.

pub mod error;
#[cfg(test)]
mod fields;
pub mod image_service;
pub mod names;
pub mod runtime_service;
pub mod serve;
