//! Logs: lines for people on standard error, or JSON with `HUSK_LOG_FORMAT=json`;
//! `HUSK_LOG` filters them (`info`, `husk_pods=debug,husk_image=debug`).

use tracing_subscriber::EnvFilter;

/// Starts logging. Once.
pub fn start() {
    let filter = EnvFilter::try_from_env("HUSK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if std::env::var("HUSK_LOG_FORMAT").is_ok_and(|format| format == "json") {
        lines.json().init();
    } else {
        lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
}
