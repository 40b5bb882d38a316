//! `husk login` and `husk logout`: write docker's file, or have its credential helper do so.

use std::io::{BufRead, IsTerminal, Read, Write};

use anyhow::{Context, bail};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use super::{helper, helper_for, host_of, key_of, load, put, save, take};

/// The longest password that is read from standard input.
const PASSWORD_BYTES: u64 = 64 << 10;

/// Keeps credentials of a registry for `husk pull`, where docker keeps them: in ~/.docker/config.json.
///
/// The registry is not asked whether they are right: the next pull does that.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  husk login registry.example:5000\n  pass show registry | husk login -u me --password-stdin registry.example"
)]
pub struct Arguments {
    /// The registry.
    #[arg(default_value = "docker.io")]
    server: String,
    /// The user. Without it, the terminal is asked.
    #[arg(long, short)]
    username: Option<String>,
    /// The password, which other users of this machine see in the list of processes while husk runs.
    #[arg(long, short, conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from standard input.
    #[arg(long, requires = "username")]
    password_stdin: bool,
}

/// Forgets the credentials of a registry.
#[derive(Debug, clap::Args)]
pub struct Logout {
    /// The registry.
    #[arg(default_value = "docker.io")]
    server: String,
}

/// Saves the credentials.
pub async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let host = host_of(&arguments.server);
    if host.is_empty() {
        bail!("`{}` names no registry", arguments.server);
    }
    let mut file = load()?;
    let user = match &arguments.username {
        Some(user) => user.clone(),
        None => asked(&format!("User at {host}: "), true)?,
    };
    let password = match &arguments.password {
        Some(password) => password.clone(),
        None if arguments.password_stdin => first_line(std::io::stdin().lock().take(PASSWORD_BYTES))?,
        None => asked("Password: ", false)?,
    };
    if user.is_empty() || user.contains(':') || password.is_empty() {
        bail!("log in at {host}: a user without a colon and a password are needed");
    }
    let place = match helper_for(&file, host).map(str::to_owned) {
        Some(name) => {
            helper::store(&name, key_of(host), &user, &password).await?;
            format!("docker-credential-{name}")
        }
        None => {
            put(&mut file, host, &user, &password);
            save(&file)?.display().to_string()
        }
    };
    println!("credentials of {user} at {host} are in {place}; the next pull tries them");
    Ok(())
}

/// Removes the credentials.
pub async fn logout(arguments: &Logout) -> anyhow::Result<()> {
    let host = host_of(&arguments.server);
    let mut file = load()?;
    if let Some(name) = helper_for(&file, host).map(str::to_owned) {
        helper::erase(&name, key_of(host)).await?;
    }
    if take(&mut file, host) {
        save(&file)?;
    }
    println!("there are no credentials of {host} any more");
    Ok(())
}

/// Asks on the terminal; `echo` shows what is typed.
fn asked(question: &str, echo: bool) -> anyhow::Result<String> {
    let input = std::io::stdin();
    if !input.is_terminal() {
        bail!("standard input is no terminal: give --username and --password-stdin");
    }
    eprint!("{question}");
    std::io::stderr().flush()?;
    let before = tcgetattr(&input).context("ask on the terminal")?;
    let mut silent = before.clone();
    silent.local_flags.set(LocalFlags::ECHO, echo);
    tcsetattr(&input, SetArg::TCSAFLUSH, &silent).context("ask on the terminal")?;
    let answer = first_line(input.lock());
    tcsetattr(&input, SetArg::TCSANOW, &before).context("give the terminal back")?;
    if !echo {
        eprintln!();
    }
    answer
}

fn first_line(mut input: impl BufRead) -> anyhow::Result<String> {
    let mut line = String::new();
    input.read_line(&mut line).context("read standard input")?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_keeps_its_spaces_and_loses_its_newline() {
        assert_eq!(first_line(" a b \r\nmore".as_bytes()).unwrap(), " a b ");
        assert_eq!(first_line("".as_bytes()).unwrap(), "");
    }
}
