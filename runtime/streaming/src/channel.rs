//! The numbers of the channels of an exec or attach over a WebSocket, which are Kubernetes'
//! (`v5.channel.k8s.io`).

/// The protocol in which a half of a stream can be closed.
pub const PROTOCOL: &str = "v5.channel.k8s.io";

/// The process's input.
pub const STDIN: u8 = 0;
/// The process's output.
pub const STDOUT: u8 = 1;
/// The process's other output.
pub const STDERR: u8 = 2;
/// How the process ended.
pub const ERROR: u8 = 3;
/// The size of the client's terminal.
pub const RESIZE: u8 = 4;
/// The number of the channel that its sender is done with follows.
pub const CLOSE: u8 = 255;
