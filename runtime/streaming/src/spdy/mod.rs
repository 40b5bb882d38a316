//! SPDY/3.1, the server's side: many streams on one connection, as `kubectl`,
//! `crictl` and the kubelet speak it for exec, attach and port-forward.
//!
//! The draft is "SPDY Protocol - Draft 3.1". What its only client in this field
//! (Go's `spdystream`) makes of it:
//!
//! | the draft                      | that client                                     |
//! | ------------------------------ | ----------------------------------------------- |
//! | data flows by window           | sends no WINDOW_UPDATE and minds none           |
//! | SYN_REPLY may follow data      | drops data that comes before SYN_REPLY          |
//! | SETTINGS open a session        | sends none, needs none                          |
//! | GOAWAY announces the end       | takes it as the end: reads nothing behind it    |
//! | a ping is answered             | the same; pings every 10 s inside a WebSocket   |
//! | a half is closed by FLAG_FIN   | the same                                        |
//!
//! So bytes are held up by TCP alone: a session stops reading while a stream's
//! buffer is full, and its streams stop when the client does not read. For a
//! client that does keep to windows, WINDOW_UPDATE is sent for every byte that
//! has found room in a buffer.

mod connection;
mod dictionary;
pub mod frame;
pub mod header;
#[cfg(test)]
pub mod tests;

pub use connection::{Connection, Stream};
