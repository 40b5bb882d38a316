//! Compiles the interfaces with protox, so that nobody has to install `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut protos = vec!["agent/v1/agent.proto"];
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        protos.push("cri/v1/api.proto");
    }
    for proto in &protos {
        println!("cargo::rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(&protos, ["."])?;
    // huskd stores CRI messages as JSON in its records, and shows them to
    // users.
    tonic_prost_build::configure()
        .message_attribute(".runtime.v1", "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]")
        .compile_fds(descriptors)?;
    Ok(())
}
