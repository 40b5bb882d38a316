//! Signals by the names and numbers that people give them.

use anyhow::bail;

/// The first real-time signal that the C library leaves to programs, and the last one.
const REAL_TIME: (i32, i32) = (34, 64);

/// The number of a signal: `9`, `KILL`, `sigkill`, `SIGRTMIN+3`.
///
/// # Errors
/// Text that names none.
pub fn number(given: &str) -> anyhow::Result<i32> {
    let unknown = || anyhow::anyhow!("`{given}` is no signal: write HUP, SIGHUP or 1");
    if let Ok(number) = given.parse::<i32>() {
        return if (1..=REAL_TIME.1).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let upper = given.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str| if rest.is_empty() { Ok(0) } else { rest.parse::<u8>().map(i32::from) };
    let number = if let Some(rest) = bare.strip_prefix("RTMIN") {
        REAL_TIME.0 + offset(rest.trim_start_matches('+')).map_err(|_| unknown())?
    } else if let Some(rest) = bare.strip_prefix("RTMAX") {
        REAL_TIME.1 - offset(rest.trim_start_matches('-')).map_err(|_| unknown())?
    } else {
        format!("SIG{bare}").parse::<nix::sys::signal::Signal>().map_err(|_| unknown())? as i32
    };
    if (1..=REAL_TIME.1).contains(&number) { Ok(number) } else { bail!(unknown()) }
}

/// The name of a signal with `SIG` before it: `SIGKILL`, `SIGRTMIN+3`.
///
/// # Errors
/// Text that names none.
pub fn name(given: &str) -> anyhow::Result<String> {
    let number = number(given)?;
    if let Ok(signal) = nix::sys::signal::Signal::try_from(number) {
        return Ok(signal.as_str().to_owned());
    }
    // CRI names the signals of the upper half by their distance from the last one.
    let (first, last) = REAL_TIME;
    Ok(match (number - first, last - number) {
        (..0, _) => bail!("`{given}` is a signal of the C library's own"),
        (0, _) => "SIGRTMIN".into(),
        (_, 0) => "SIGRTMAX".into(),
        (up, down) if up <= down => format!("SIGRTMINPLUS{up}"),
        (_, down) => format!("SIGRTMAXMINUS{down}"),
    })
}

#[cfg(test)]
mod tests {
    use husk_proto::cri;

    use super::*;

    #[test]
    fn signals_have_many_names() {
        for given in ["9", "KILL", "kill", "SIGKILL", "sigkill"] {
            assert_eq!(number(given).unwrap(), 9, "{given}");
        }
        assert_eq!([number("RTMIN+3").unwrap(), number("SIGRTMAX-1").unwrap()], [37, 63]);
        for given in ["", "0", "65", "-1", "NONE", "RTMIN+99", "RTMAX-999"] {
            assert!(number(given).is_err(), "{given}");
        }
    }

    #[test]
    fn every_signal_has_a_name_that_cri_knows() {
        for number in (1..=31).chain(34..=64) {
            let name = name(&number.to_string()).unwrap();
            assert!(cri::Signal::from_str_name(&format!("SIGNAL_{name}")).is_some(), "{number}: {name}");
        }
    }
}
