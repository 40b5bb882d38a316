//! Ports that a pod has on the host: `-p`.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::str::FromStr;

use anyhow::{Context, bail};
use husk_proto::cri;
use serde_json::Value;

/// Ports that are published: `[IP:][HOST_PORT:]PORT[/PROTOCOL]`; ports can be ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    address: String,
    /// Ports of the host; none for free ones.
    host: Option<RangeInclusive<u16>>,
    inside: RangeInclusive<u16>,
    protocol: cri::Protocol,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = cri::Protocol::from_str_name(&protocol.to_ascii_uppercase())
            .ok_or_else(|| format!("`{protocol}` is no protocol: there are tcp, udp and sctp"))?;
        let (rest, inside) = rest.rsplit_once(':').map_or(("", rest), |(before, inside)| (before, inside));
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => (address, host),
            None => ("", rest),
        };
        let address = address.trim_start_matches('[').trim_end_matches(']');
        if !address.is_empty() && address.parse::<IpAddr>().is_err() {
            return Err(format!("`{address}` is no IP address"));
        }
        let inside = range(inside)?;
        let host = if host.is_empty() { None } else { Some(range(host)?) };
        if host.as_ref().is_some_and(|host| host.len() != inside.len()) {
            return Err("both ranges of ports have to be of one length".into());
        }
        Ok(Self { address: address.to_owned(), host, inside, protocol })
    }
}

/// `80`, or `8000-8010`.
fn range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("`{text}` is no port: ports are 1 to 65535")),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last { Err(format!("`{text}` is a range from high to low")) } else { Ok(first..=last) }
}

impl Port {
    /// Mappings from free ports of the host to all ports that an image exposes; `info` is the
    /// verbose part of its status.
    ///
    /// # Errors
    /// Text that is no port, and no free port.
    pub fn exposed_by(info: &Value) -> anyhow::Result<Vec<cri::PortMapping>> {
        let ports = info.pointer("/imageSpec/config/ExposedPorts").and_then(Value::as_object);
        let mut mappings = Vec::new();
        for text in ports.into_iter().flat_map(|ports| ports.keys()) {
            let port: Self =
                text.parse().map_err(|error| anyhow::anyhow!("-P: the image exposes `{text}`: {error}"))?;
            mappings.extend(port.mappings().context("-P")?);
        }
        Ok(mappings)
    }

    /// The mappings in CRI's words, with free ports of the host where none are named.
    ///
    /// # Errors
    /// No port of the host is free.
    pub fn mappings(&self) -> anyhow::Result<Vec<cri::PortMapping>> {
        let mapping = |(place, inside): (usize, u16)| {
            let host = match &self.host {
                Some(host) => host.clone().nth(place).context("both ranges have one length")?,
                None => self.free()?,
            };
            Ok(cri::PortMapping {
                protocol: self.protocol.into(),
                container_port: inside.into(),
                host_port: host.into(),
                host_ip: self.address.clone(),
            })
        };
        self.inside.clone().enumerate().map(mapping).collect()
    }

    /// A port that nobody uses at this moment.
    fn free(&self) -> anyhow::Result<u16> {
        let address: IpAddr = self.address.parse().unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        let found = match self.protocol {
            cri::Protocol::Tcp => TcpListener::bind((address, 0)).and_then(|socket| socket.local_addr()),
            cri::Protocol::Udp => UdpSocket::bind((address, 0)).and_then(|socket| socket.local_addr()),
            cri::Protocol::Sctp => bail!("-p: name the port of the host for SCTP"),
        };
        Ok(found.with_context(|| format!("find a free port on {address}"))?.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(text: &str) -> Vec<(String, i32, i32, i32)> {
        let mappings = text.parse::<Port>().unwrap().mappings().unwrap();
        let parts = |one: cri::PortMapping| (one.host_ip, one.host_port, one.container_port, one.protocol);
        mappings.into_iter().map(parts).collect()
    }

    #[test]
    fn ports_are_written_as_for_docker() {
        assert_eq!(mappings("8080:80"), [(String::new(), 8080, 80, 0)]);
        assert_eq!(mappings("127.0.0.1:53:53/udp"), [("127.0.0.1".into(), 53, 53, 1)]);
        assert_eq!(mappings("[::1]:8080:80"), [("::1".into(), 8080, 80, 0)]);
        assert_eq!(mappings("8000-8001:80-81"), [(String::new(), 8000, 80, 0), (String::new(), 8001, 81, 0)]);
        let [(_, host, inside, _)] = mappings("127.0.0.1::80")[..] else { panic!() };
        assert!(host > 1023 && inside == 80);
        let [(_, host, inside, _)] = mappings("80")[..] else { panic!() };
        assert!(host > 1023 && inside == 80);
        for text in
            ["", "0:80", "80:", "70000:80", "x:80", "80/tls", "1.2:80:80", "1-2:80", "81-80", "a:b:c:d"]
        {
            assert!(text.parse::<Port>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_port_that_an_image_exposes_gets_one_of_the_host() {
        let image = |info: &str| serde_json::from_str::<Value>(info).unwrap();
        let two = image(r#"{"imageSpec":{"config":{"ExposedPorts":{"53/udp":{},"80/tcp":{}}}}}"#);
        let mappings = Port::exposed_by(&two).unwrap();
        assert_eq!(mappings.iter().map(|mapping| mapping.container_port).collect::<Vec<_>>(), [53, 80]);
        assert!(mappings.iter().all(|mapping| mapping.host_port > 0));
        assert_eq!(Port::exposed_by(&image("{}")).unwrap(), Vec::new());
        assert!(Port::exposed_by(&image(r#"{"imageSpec":{"config":{"ExposedPorts":{"x":{}}}}}"#)).is_err());
    }
}
