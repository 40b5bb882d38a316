//! The part of systemd's interface that makes and ends units (org.freedesktop.systemd1(5)).

use std::io;
#[cfg(test)]
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use husk_base::chain;
use zbus::{Connection, ObjectPath, Variant, connection};

use crate::within;

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";

/// Most time that a call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The error of a unit that is not there.
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";

/// A unit could not be made or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error(
        "systemd: connect to its bus: {0} (is systemd the init of this host, and its bus there? If not, set \
         `cgroup_driver = \"cgroupfs\"` in huskd's configuration)"
    )]
    Connect(String),
    /// A call failed.
    #[error("systemd: {what}")]
    Bus {
        /// The call.
        what: &'static str,
        /// The reason.
        #[source]
        cause: Box<zbus::Error>,
    },
    /// A call got no answer.
    #[error("systemd: {what}: no answer within {seconds} s")]
    Late {
        /// The call.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// There is no process to begin with.
    #[error("systemd: make the first process of a scope")]
    Idle(#[source] io::Error),
    /// The control group is none of a scope.
    #[error("systemd: {0} is no control group of a scope")]
    NoScope(PathBuf),
    /// The scope has another control group.
    #[error(
        "systemd: the scope {scope} was made and {path} is not its control group: its process is in {group}"
    )]
    Elsewhere {
        /// The scope.
        scope: String,
        /// The control group that it should have.
        path: PathBuf,
        /// The control group that it has.
        group: PathBuf,
    },
}

/// A connection to systemd.
#[derive(Debug)]
pub struct Manager(Connection);

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

impl Manager {
    /// Connects over the system's message bus. systemd's own socket (`/run/systemd/private`) is
    /// no way: its answers have a sender that D-Bus does not allow.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub async fn connect() -> Result<Self, Error> {
        let bus = connection::Builder::system().build();
        let connected = within(CALL_TIMEOUT, "connect", bus).await;
        connected.map(Self).map_err(|error| Error::Connect(chain(&error)))
    }

    /// Speaks with the one at the other end of a socket, without a message bus.
    #[cfg(test)]
    async fn over(socket: UnixStream) -> Result<Self, Error> {
        let connection = connection::Builder::unix_stream(socket).p2p().build();
        Ok(Self(within(CALL_TIMEOUT, "connect", connection).await?))
    }

    /// Asks for a transient scope in `slice`, with one process in it.
    ///
    /// # Errors
    /// systemd refuses, or does not answer in time.
    pub async fn start_scope(
        &self,
        scope: &str,
        slice: &str,
        pid: u32,
        description: &str,
    ) -> Result<(), Error> {
        let properties: Properties<'_> = vec![
            ("Description", description.into()),
            ("Slice", slice.into()),
            ("PIDs", vec![pid].into()),
            ("Delegate", true.into()),
            // Pods end when they are told to, and not with the first step of a shutdown.
            ("DefaultDependencies", false.into()),
            // A scope whose processes were killed does not stay behind as a failed one.
            ("CollectMode", "inactive-or-failed".into()),
            ("CPUAccounting", true.into()),
            ("MemoryAccounting", true.into()),
            ("IOAccounting", true.into()),
            ("TasksAccounting", true.into()),
            // The limit is the slice's.
            ("TasksMax", u64::MAX.into()),
        ];
        let others: Vec<(&str, Properties<'_>)> = Vec::new();
        self.call("start a scope", "StartTransientUnit", &(scope, "fail", properties, others)).await
    }

    /// Ends a unit. One that is not there is no error.
    ///
    /// # Errors
    /// systemd refuses, or does not answer in time.
    pub async fn stop(&self, unit: &str) -> Result<(), Error> {
        match self.call("stop a scope", "StopUnit", &(unit, "replace")).await {
            Err(Error::Bus { cause, .. }) if matches!(&*cause, zbus::Error::MethodError(name, ..) if name.as_str() == NO_SUCH_UNIT) => {
                Ok(())
            }
            done => done,
        }
    }

    async fn call<B>(&self, what: &'static str, method: &str, body: &B) -> Result<(), Error>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let call = self.0.call_method(Some(NAME), PATH, Some(INTERFACE), method, body);
        let answer = within(CALL_TIMEOUT, what, call).await?;
        let job = answer.body();
        let job: Result<ObjectPath<'_>, _> = job.deserialize();
        job.map(drop).map_err(|cause| Error::Bus { what, cause: Box::new(cause) })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use futures::StreamExt;
    use zbus::message::Type;
    use zbus::{Guid, Message, MessageStream, OwnedVariant};

    use super::*;

    /// Answers calls as systemd would: `refused` by an error of that name.
    async fn systemd(socket: UnixStream, refused: Option<&'static str>) -> Vec<Message> {
        let server = connection::Builder::unix_stream(socket).server(Guid::generate()).p2p();
        let connection = server.build().await.unwrap();
        let mut calls = Vec::new();
        let mut messages = MessageStream::from(&connection);
        while let Some(Ok(message)) = messages.next().await {
            if message.message_type() != Type::MethodCall {
                continue;
            }
            let header = message.header();
            let answer = match refused {
                None => Message::method_return(&header)
                    .build(&(ObjectPath::try_from("/org/freedesktop/systemd1/job/1").unwrap(),)),
                Some(name) => Message::error(&header, name).build(&("no",)),
            };
            connection.send(&answer.unwrap()).await.unwrap();
            calls.push(message.clone());
        }
        calls
    }

    #[tokio::test]
    async fn a_scope_is_asked_for_as_systemd_wants_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let systemd = tokio::spawn(systemd(theirs, None));
        let manager = Manager::over(ours).await.unwrap();
        manager.start_scope("husk-1.scope", "a-b.slice", 77, "a pod").await.unwrap();
        manager.stop("husk-1.scope").await.unwrap();
        drop(manager);
        let calls = systemd.await.unwrap();
        let members: Vec<_> =
            calls.iter().map(|call| call.header().member().unwrap().as_str().to_owned()).collect();
        assert_eq!(members, ["StartTransientUnit", "StopUnit"]);
        let header = calls[0].header();
        assert_eq!(header.path().unwrap().as_str(), PATH);
        assert_eq!(header.interface().unwrap().as_str(), INTERFACE);
        let body = calls[0].body();
        assert_eq!(body.signature().to_string(), "(ssa(sv)a(sa(sv)))");
        type Kept = Vec<(String, OwnedVariant)>;
        let (scope, mode, properties, others): (String, String, Kept, Vec<(String, Kept)>) =
            body.deserialize().unwrap();
        assert_eq!((scope.as_str(), mode.as_str(), others.len()), ("husk-1.scope", "fail", 0));
        let properties: HashMap<_, _> = properties.into_iter().collect();
        assert_eq!(<&str>::try_from(&*properties["Slice"]).unwrap(), "a-b.slice");
        assert!(bool::try_from(&*properties["Delegate"]).unwrap());
        assert!(!bool::try_from(&*properties["DefaultDependencies"]).unwrap());
        assert_eq!(properties["PIDs"].value_signature().to_string(), "au");
        assert_eq!(properties["TasksMax"].value_signature().to_string(), "t");
        let body = calls[1].body();
        let stopped: (String, String) = body.deserialize().unwrap();
        assert_eq!(stopped, ("husk-1.scope".into(), "replace".into()));
    }

    #[tokio::test]
    async fn a_unit_that_is_not_there_is_stopped_and_other_errors_are_told() {
        for (name, told) in [(NO_SUCH_UNIT, false), ("org.freedesktop.DBus.Error.AccessDenied", true)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let systemd = tokio::spawn(systemd(theirs, Some(name)));
            let manager = Manager::over(ours).await.unwrap();
            assert_eq!(manager.stop("husk-1.scope").await.is_err(), told, "{name}");
            let error = manager.start_scope("husk-1.scope", "a.slice", 77, "").await.unwrap_err();
            assert!(chain(&error).contains("start a scope"), "{}", chain(&error));
            drop(manager);
            systemd.await.unwrap();
        }
    }
}
