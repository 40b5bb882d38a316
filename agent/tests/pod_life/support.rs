//! Starts a real agent as pid 1 of its own namespaces, and talks to it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use husk_proto::agent::agent_client::AgentClient;
use husk_proto::agent::stream::{Kind, StreamHeader};
use husk_proto::agent::*;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio_vsock::{VMADDR_CID_LOCAL, VsockAddr, VsockStream};
use tonic::transport::{Channel, Endpoint};

pub const MAC: &str = "02:00:0a:58:00:05";
const START: Duration = Duration::from_secs(30);

/// A running agent. It ends when this is dropped.
pub struct Machine {
    unshare: Child,
    /// The agent's pid, seen from outside.
    pub pid: u32,
    pub client: AgentClient<Channel>,
}

/// Starts an agent as pid 1 of its own namespaces.
fn spawn(arguments: &[&str]) -> Child {
    Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount", "--net", "--uts", "--ipc"])
        .arg(env!("CARGO_BIN_EXE_husk-agent"))
        .args(arguments)
        .spawn()
        .unwrap()
}

/// Connects to an agent that serves the host from its own machine, and returns
/// the bytes that it sends before it closes.
pub async fn answer_to_a_stranger() -> Vec<u8> {
    let mut agent = spawn(&[]);
    let deadline = Instant::now() + START;
    let mut stream = loop {
        match VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, GRPC_PORT)).await {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "the agent does not listen: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    // A connection of gRPC opens so (RFC 9113 §3.4).
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(START, stream.read_to_end(&mut answer)).await;
    let _ = agent.kill();
    let _ = agent.wait();
    assert!(read.is_ok(), "the agent keeps the connection, and says {answer:?}");
    answer
}

impl Machine {
    pub async fn start() -> Self {
        // The kernel's loopback stands for the host.
        let unshare = spawn(&["--vsock-peer", "1"]);
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let deadline = Instant::now() + START;
        let pid = loop {
            let child = fs::read_to_string(&children).unwrap_or_default();
            if let Ok(pid) = child.trim().parse::<u32>()
                && fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|comm| comm.trim() == "husk-agent")
            {
                break pid;
            }
            assert!(Instant::now() < deadline, "the agent does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        run("ip", &["link", "add", "husk-test0", "type", "veth", "peer", "name", "guest0", "address", MAC]);
        run("ip", &["link", "set", "guest0", "netns", &pid.to_string()]);
        run("ip", &["link", "set", "husk-test0", "up"]);
        let connector = tower::service_fn(|_| async {
            VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, GRPC_PORT)).await.map(TokioIo::new)
        });
        let client = loop {
            match Endpoint::from_static("http://agent").connect_with_connector(connector).await {
                Ok(channel) => break AgentClient::new(channel),
                Err(error) => assert!(Instant::now() < deadline, "the agent does not answer: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        Self { unshare, pid, client }
    }

    /// Reads a file in the agent's mount namespace.
    pub fn read(&self, path: &str) -> String {
        let path = format!("/proc/{}/root{path}", self.pid);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub fn exists(&self, path: &str) -> bool {
        Path::new(&format!("/proc/{}/root{path}", self.pid)).exists()
    }

    pub fn mounts(&self) -> String {
        fs::read_to_string(format!("/proc/{}/mounts", self.pid)).unwrap()
    }

    /// Runs a command in the agent's network namespace.
    pub fn in_netns(&self, command: &str) -> String {
        let output = Command::new("nsenter")
            .args(["--net", "--target", &self.pid.to_string(), "sh", "-c", command])
            .output()
            .unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether the agent has ended, within the deadline.
    pub fn ended(&mut self) -> bool {
        let deadline = Instant::now() + START;
        while Instant::now() < deadline {
            if self.unshare.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    pub async fn create(&mut self, request: CreateContainerRequest) -> Result<u32, tonic::Status> {
        self.client.create_container(request).await.map(|response| response.into_inner().pid)
    }

    pub async fn start_container(&mut self, id: &str) {
        self.client.start_container(StartContainerRequest { container_id: id.into() }).await.unwrap();
    }

    pub async fn remove(&mut self, id: &str) {
        self.client.remove_container(RemoveContainerRequest { container_id: id.into() }).await.unwrap();
    }

    pub async fn wait(&mut self, id: &str, process: &str) -> WaitProcessResponse {
        let request = WaitProcessRequest { container_id: id.into(), process_id: process.into() };
        self.client.wait_process(request).await.unwrap().into_inner()
    }

    pub async fn exec(&mut self, id: &str, process: &str, args: &[&str]) -> Result<u32, tonic::Status> {
        self.exec_with(id, process, args, false, false).await
    }

    pub async fn exec_with(
        &mut self,
        id: &str,
        process: &str,
        args: &[&str],
        terminal: bool,
        stdin: bool,
    ) -> Result<u32, tonic::Status> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            process_id: process.into(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            terminal,
            stdin,
        };
        self.client.exec_process(request).await.map(|response| response.into_inner().pid)
    }

    pub async fn signal(&mut self, id: &str, process: &str, signal: i32, all: bool) {
        let request = SignalProcessRequest {
            container_id: id.into(),
            process_id: process.into(),
            signal: signal.cast_unsigned(),
            all,
        };
        self.client.signal_process(request).await.unwrap();
    }

    /// Runs a command to its end; returns its output and exit code.
    pub async fn output_of(&mut self, id: &str, process: &str, args: &[&str]) -> (String, i32) {
        self.exec(id, process, args).await.unwrap();
        let output = read_all(stream(Kind::Stdout, id, process).await.unwrap()).await;
        (String::from_utf8(output).unwrap(), self.wait(id, process).await.exit_code)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let _ = Command::new("ip").args(["link", "del", "husk-test0"]).output();
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

/// Connects to a standard stream.
pub async fn stream(kind: Kind, container: &str, process: &str) -> Result<VsockStream, String> {
    let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, STREAM_PORT)).await.unwrap();
    let header = StreamHeader { kind, container_id: container.into(), process_id: process.into() };
    stream.write_all(format!("{header}\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    let mut byte = [0];
    while stream.read(&mut byte).await.unwrap() == 1 && byte[0] != b'\n' {
        answer.push(char::from(byte[0]));
    }
    if answer == "OK" { Ok(stream) } else { Err(answer) }
}

pub async fn read_all(mut stream: VsockStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut bytes)).await.unwrap().unwrap();
    bytes
}

/// Reads lines until one contains `text`.
pub async fn read_until(stream: &mut BufReader<VsockStream>, text: &str) {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read_line(&mut line)).await;
        assert!(read.unwrap().unwrap() > 0, "the stream ended before {text:?}");
    }
}

/// The request to create a container that runs `args`.
pub fn container(id: &str, args: &[&str]) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.into(),
        spec_json: spec(id, args).to_string().into_bytes(),
        rootfs: Some(Rootfs { image_serial: "image".into(), ..Rootfs::default() }),
        user: Some(User::default()),
        terminal: false,
        stdin: false,
        stdin_once: false,
        image_volumes: Vec::new(),
        apparmor: None,
        all_devices: false,
    }
}

/// An OCI configuration as huskd writes it.
pub fn spec(id: &str, args: &[&str]) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities
            },
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "bind", "source": paths::SHM, "options": ["rbind", "rw"]},
            {"destination": "/etc/hosts", "type": "bind", "source": paths::HOSTS, "options": ["rbind", "rw"]},
        ],
        "linux": {
            "cgroupsPath": format!("/pod/{id}"),
            "namespaces": [{"type": "mount"}, {"type": "pid"}],
            "resources": {"memory": {"limit": 64 << 20, "swap": 64 << 20}}
        }
    })
}
