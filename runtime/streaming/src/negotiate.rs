//! The choice of a protocol, by the head of a client's request.

use hyper::HeaderMap;
use hyper::header::{CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::channel;
use super::status::Language;

/// The header in which a SPDY client names the protocols that it knows, and the
/// answer names the one that is spoken.
pub const STREAM_PROTOCOL: &str = "x-stream-protocol-version";

/// The header that names our protocols to a SPDY client that knows none of them.
pub const ACCEPTED_PROTOCOLS: &str = "x-accepted-stream-protocol-versions";

/// The value of `Upgrade` for SPDY.
pub const SPDY: &str = "SPDY/3.1";

/// The port-forward protocol over SPDY.
pub const PORTS: &str = "portforward.k8s.io";

/// The port-forward protocol in a WebSocket.
pub const PORTS_TUNNELLED: &str = "SPDY/3.1+portforward.k8s.io";

/// A protocol of exec and attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// The name on the wire.
    pub name: &'static str,
    /// The language of the error stream.
    pub language: Language,
    /// Whether there is a stream for the terminal's size.
    pub resizes: bool,
    /// Whether the client can close its half of a WebSocket's channel.
    pub closes: bool,
    /// Whether a WebSocket's messages are text.
    pub base64: bool,
}

const fn protocol(name: &'static str, language: Language, resizes: bool) -> Protocol {
    Protocol { name, language, resizes, closes: false, base64: false }
}

/// The protocol over SPDY with clients that name none.
pub const OLDEST: Protocol = protocol("channel.k8s.io", Language::Text, false);

/// The protocols over SPDY, the best first.
pub const SPDY_PROTOCOLS: [Protocol; 4] = [
    protocol("v4.channel.k8s.io", Language::Status, true),
    protocol("v3.channel.k8s.io", Language::Text, true),
    protocol("v2.channel.k8s.io", Language::Text, false),
    OLDEST,
];

/// The protocols over WebSocket, the best first. There is a channel for the terminal's size in all of them.
pub const WEBSOCKET_PROTOCOLS: [Protocol; 5] = [
    Protocol { closes: true, ..protocol(channel::PROTOCOL, Language::Status, true) },
    protocol("v4.channel.k8s.io", Language::Status, true),
    Protocol { base64: true, ..protocol("v4.base64.channel.k8s.io", Language::Status, true) },
    OLDEST_WEBSOCKET,
    Protocol { base64: true, ..protocol("base64.channel.k8s.io", Language::Text, true) },
];

/// The protocol over WebSocket with clients that name none.
pub const OLDEST_WEBSOCKET: Protocol = protocol("channel.k8s.io", Language::Text, true);

/// The transport of the streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The protocol SPDY/3.1.
    Spdy,
    /// A WebSocket.
    WebSocket {
        /// The proof to the client that its handshake was understood.
        accept: String,
    },
}

/// The carrier that the client asks for.
///
/// # Errors
/// The reason, for the client.
pub fn carrier(headers: &HeaderMap) -> Result<Carrier, &'static str> {
    if !values(headers, CONNECTION.as_str()).any(|value| value.eq_ignore_ascii_case("upgrade")) {
        return Err("this address is for streams: ask for an upgrade to SPDY/3.1 or websocket");
    }
    let wants = |name: &str| values(headers, UPGRADE.as_str()).any(|value| value.eq_ignore_ascii_case(name));
    if wants(SPDY) {
        return Ok(Carrier::Spdy);
    }
    if !wants("websocket") {
        return Err("unknown upgrade: SPDY/3.1 and websocket are spoken here");
    }
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        return Err("WebSocket version 13 is spoken here");
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or("a WebSocket handshake needs its Sec-WebSocket-Key")?;
    Ok(Carrier::WebSocket { accept: derive_accept_key(key.as_bytes()) })
}

/// The values of a header, over several lines and between commas.
pub fn values<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|value| !value.is_empty())
}

/// The first of the client's protocols that is among ours.
pub fn choose<'a>(offered: impl Iterator<Item = &'a str>, ours: &[Protocol]) -> Option<Protocol> {
    let mut offered = offered;
    offered.find_map(|name| ours.iter().find(|protocol| protocol.name == name)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn the_clients_first_choice_that_we_speak_is_spoken() {
        let lines = headers(&[
            (STREAM_PROTOCOL, "v5.channel.k8s.io"),
            (STREAM_PROTOCOL, "v4.channel.k8s.io, v3.channel.k8s.io"),
        ]);
        let chosen = choose(values(&lines, STREAM_PROTOCOL), &SPDY_PROTOCOLS).unwrap();
        assert_eq!(chosen.name, "v4.channel.k8s.io");
        assert_eq!(choose(["v9", "channel.k8s.io"].into_iter(), &SPDY_PROTOCOLS), Some(OLDEST));
        assert_eq!(choose(["v9"].into_iter(), &SPDY_PROTOCOLS), None);
    }

    #[test]
    fn both_upgrades_are_understood_and_others_refused() {
        let spdy = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "spdy/3.1")]);
        assert_eq!(carrier(&spdy), Ok(Carrier::Spdy));
        // The example of RFC 6455, section 1.3.
        let websocket = [
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned();
        assert_eq!(carrier(&headers(&websocket)), Ok(Carrier::WebSocket { accept }));
        assert!(carrier(&headers(&websocket[..3])).is_err());
        assert!(carrier(&headers(&[("connection", "upgrade"), ("upgrade", "h2c")])).is_err());
        assert!(carrier(&headers(&[("upgrade", "SPDY/3.1")])).is_err());
        assert!(carrier(&HeaderMap::new()).is_err());
    }
}
