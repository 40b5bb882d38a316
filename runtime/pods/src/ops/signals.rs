//! Signals by the names and numbers that clients and images give them.

use husk_proto::cri;

use crate::Error;

/// The signal that asks a container to stop: the client's, else the image's,
/// else SIGTERM.
pub(crate) fn stop_signal(config: &cri::ContainerConfig, image: Option<&str>) -> Result<i32, Error> {
    let asked = cri::Signal::try_from(config.stop_signal)
        .map_err(|_| Error::Invalid(format!("unknown stop_signal {}", config.stop_signal)))?;
    if asked != cri::Signal::RuntimeDefault {
        let name = asked.as_str_name();
        let name = name.strip_prefix("SIGNAL_").unwrap_or(name);
        return number(name).ok_or_else(|| Error::Invalid(format!("unknown stop_signal {name}")));
    }
    match image {
        None | Some("") => Ok(libc::SIGTERM),
        Some(name) => {
            number(name).ok_or_else(|| Error::Invalid(format!("the image's stop signal `{name}` is unknown")))
        }
    }
}

/// A signal as CRI counts it; those that it does not have are its default.
#[must_use]
pub fn cri_signal(wanted: i32) -> cri::Signal {
    // Some have two names; the first is as good as the other.
    let all = (1..).map_while(|value| cri::Signal::try_from(value).ok());
    all.into_iter()
        .find(|signal| number(signal.as_str_name().trim_start_matches("SIGNAL_")) == Some(wanted))
        .unwrap_or(cri::Signal::RuntimeDefault)
}

/// A signal by name (`SIGQUIT`, `QUIT`, `SIGRTMIN+3`, `SIGRTMINPLUS3`) or number.
fn number(name: &str) -> Option<i32> {
    /// The first real-time signal that the C library leaves to programs.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let name = name.to_ascii_uppercase();
    let bare = name.strip_prefix("SIG").unwrap_or(&name);
    let offset = |rest: &str, word: &str, sign: char| -> Option<i32> {
        match rest.strip_prefix(word).or_else(|| rest.strip_prefix(sign)) {
            // Any that is larger is no signal's, and its sum may be no number.
            Some(digits) => digits.parse::<u8>().ok().map(i32::from),
            None => rest.is_empty().then_some(0),
        }
    };
    let number = if let Some(rest) = bare.strip_prefix("RTMIN") {
        RTMIN + offset(rest, "PLUS", '+')?
    } else if let Some(rest) = bare.strip_prefix("RTMAX") {
        RTMAX - offset(rest, "MINUS", '-')?
    } else {
        match bare {
            "CLD" => libc::SIGCHLD,
            "POLL" => libc::SIGIO,
            "IOT" => libc::SIGABRT,
            _ => format!("SIG{bare}").parse::<nix::sys::signal::Signal>().ok()? as i32,
        }
    };
    (1..=RTMAX).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_many_names() {
        for (name, want) in [
            ("SIGQUIT", Some(3)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMINPLUS3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("SIGCLD", Some(17)),
            ("SIGRTMIN+99", None),
            ("RTMIN+2147483647", None),
            ("RTMIN+-3", None),
            ("RTMAX--2147483648", None),
            ("SIGRTMINx", None),
            ("99", None),
            ("0", None),
            ("SIGNOTHING", None),
        ] {
            assert_eq!(number(name), want, "{name}");
        }
    }

    #[test]
    fn every_signal_of_the_interface_has_a_number() {
        for value in 1..=65 {
            let signal = cri::Signal::try_from(value).unwrap();
            let config = cri::ContainerConfig { stop_signal: value, ..Default::default() };
            let number = stop_signal(&config, None).unwrap();
            assert_eq!(
                super::number(&cri_signal(number).as_str_name()[7..]),
                Some(number),
                "{}",
                signal.as_str_name()
            );
        }
        assert_eq!(cri_signal(3), cri::Signal::Sigquit);
        assert_eq!(cri_signal(32), cri::Signal::RuntimeDefault);
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), Some("SIGINT")).unwrap(), 2);
        assert_eq!(stop_signal(&cri::ContainerConfig::default(), None).unwrap(), 15);
    }
}
