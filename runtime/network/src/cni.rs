//! A chain of CNI plugins, run forwards to connect a pod and backwards to
//! disconnect it, and asked how it is in between. See the CNI specification,
//! section 3.

use husk_base::crash;
use serde_json::{Map, Value, json};

use super::conflist::{NetworkList, plugin_type};
use super::plugin::{self, Plugins, Target, Verb};

/// The version from which on DEL is given the result of ADD, and there is CHECK.
const DEL_WITH_RESULT: &str = "0.4.0";
/// The version from which on there are STATUS and GC.
const STATUS_AND_GC: &str = "1.1.0";

/// ADD failed part of the way.
#[derive(Debug)]
pub struct AddFailed {
    /// Place of the plugin that failed.
    pub at: usize,
    /// The answer of the plugins before it.
    pub result: Option<Value>,
    /// The reason.
    pub error: plugin::Error,
}

/// Runs ADD of every plugin and returns the last one's result.
pub async fn add(
    plugins: &Plugins,
    network: &NetworkList,
    target: Target<'_>,
    capabilities: &Map<String, Value>,
) -> Result<Value, AddFailed> {
    let mut result = None;
    for (at, config) in network.plugins.iter().enumerate() {
        match call(plugins, network, config, Verb::Add, target, capabilities, result.as_ref()).await {
            Ok(Value::Object(answer)) => result = Some(Value::Object(answer)),
            Ok(other) => {
                let error = plugin::Error::Answer {
                    plugin: plugin_type(config).unwrap_or_default().to_owned(),
                    command: Verb::Add,
                    reason: if other.is_null() { "it printed nothing".into() } else { other.to_string() },
                };
                return Err(AddFailed { at, result, error });
            }
            Err(error) => return Err(AddFailed { at, result, error }),
        }
    }
    Ok(result.unwrap_or_default())
}

/// Runs DEL of every plugin, the last one first, and stops at the first that
/// fails: the ones before it may hold what it still needs, its address above
/// all, which must not go to another pod while port mappings lead to it.
pub async fn del(
    plugins: &Plugins,
    network: &NetworkList,
    target: Target<'_>,
    capabilities: &Map<String, Value>,
    result: Option<&Value>,
) -> Result<(), plugin::Error> {
    let result = result.filter(|_| network.speaks(DEL_WITH_RESULT));
    for config in network.plugins.iter().rev() {
        call(plugins, network, config, Verb::Del, target, capabilities, result).await?;
    }
    Ok(())
}

/// Undoes an ADD that failed. The plugin that failed is asked too, since it
/// may have done part of its work (section 2, "ADD"), but where it fails
/// again there is nothing more to ask of it.
pub async fn undo(
    plugins: &Plugins,
    network: &NetworkList,
    target: Target<'_>,
    capabilities: &Map<String, Value>,
    failed: &AddFailed,
) -> Result<(), plugin::Error> {
    let result = failed.result.as_ref().filter(|_| network.speaks(DEL_WITH_RESULT));
    for (at, config) in network.plugins.iter().enumerate().take(failed.at.saturating_add(1)).rev() {
        match call(plugins, network, config, Verb::Del, target, capabilities, result).await {
            Err(error) if at == failed.at => {
                tracing::warn!(
                    sandbox_id = target.sandbox_id,
                    error = husk_base::chain(&error),
                    "a plugin that failed to ADD cannot undo it"
                );
            }
            answer => drop(answer?),
        }
    }
    Ok(())
}

/// Asks every plugin whether the pod is still connected as its ADD left it
/// (section 2, "CHECK"); nothing before CNI 0.4.0.
pub async fn check(
    plugins: &Plugins,
    network: &NetworkList,
    target: Target<'_>,
    capabilities: &Map<String, Value>,
    result: &Value,
) -> Result<(), plugin::Error> {
    if network.disable_check || !network.speaks(DEL_WITH_RESULT) {
        return Ok(());
    }
    for config in &network.plugins {
        call(plugins, network, config, Verb::Check, target, capabilities, Some(result)).await?;
    }
    Ok(())
}

/// Asks every plugin whether it can connect pods (section 2, "STATUS");
/// nothing before CNI 1.1.0.
pub async fn status(plugins: &Plugins, network: &NetworkList) -> Result<(), plugin::Error> {
    if network.speaks(STATUS_AND_GC) {
        for config in &network.plugins {
            call(plugins, network, config, Verb::Status, Target::NONE, &Map::new(), None).await?;
        }
    }
    Ok(())
}

/// Has every plugin give back what it holds for any pods but these, by id and
/// interface (section 2, "GC"); nothing before CNI 1.1.0. One that fails does
/// not keep the others from it.
pub async fn gc(plugins: &Plugins, network: &NetworkList, valid: &[(&str, &str)]) -> Vec<plugin::Error> {
    if network.disable_gc || !network.speaks(STATUS_AND_GC) {
        return Vec::new();
    }
    let valid: Vec<Value> =
        valid.iter().map(|(id, interface)| json!({"containerID": id, "ifname": interface})).collect();
    let mut failed = Vec::new();
    for config in &network.plugins {
        let mut config = config.clone();
        config.insert("cni.dev/valid-attachments".into(), valid.clone().into());
        failed.extend(call(plugins, network, &config, Verb::Gc, Target::NONE, &Map::new(), None).await.err());
    }
    failed
}

async fn call(
    plugins: &Plugins,
    network: &NetworkList,
    config: &Map<String, Value>,
    verb: Verb,
    target: Target<'_>,
    capabilities: &Map<String, Value>,
    result: Option<&Value>,
) -> Result<Value, plugin::Error> {
    let name = plugin_type(config).map_err(|reason| plugin::Error::Failed {
        plugin: String::new(),
        command: verb,
        reason,
    })?;
    let request = request(network, config, capabilities, result);
    crash::point(format_args!("CNI plugin to be called: {name} {verb}"));
    let answer = plugins.call(name, verb, target, &request).await;
    crash::point(format_args!("CNI plugin has answered: {name} {verb}"));
    answer
}

/// The configuration that a plugin gets on its standard input: its own, with
/// the network's name and version, the capability arguments that it asks for,
/// and the result so far (section 3, "Deriving request configuration").
fn request(
    network: &NetworkList,
    config: &Map<String, Value>,
    capabilities: &Map<String, Value>,
    result: Option<&Value>,
) -> Value {
    let mut request = config.clone();
    request.insert("name".into(), network.name.clone().into());
    request.insert("cniVersion".into(), network.cni_version.clone().into());
    if let Some(Value::Object(wanted)) = request.remove("capabilities") {
        let given: Map<String, Value> = capabilities
            .iter()
            .filter(|(name, _)| wanted.get(*name) == Some(&Value::Bool(true)))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !given.is_empty() {
            request.insert("runtimeConfig".into(), given.into());
        }
    }
    if let Some(result) = result {
        request.insert("prevResult".into(), result.clone());
    }
    request.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_gets_the_capabilities_that_it_asks_for_and_no_others() {
        let network =
            NetworkList { name: "net".into(), cni_version: "1.0.0".into(), ..NetworkList::default() };
        let Value::Object(config) = json!({
            "type": "portmap", "snat": true, "capabilities": {"portMappings": true, "mac": false},
        }) else {
            unreachable!()
        };
        let Value::Object(capabilities) = json!({
            "portMappings": [{"hostPort": 80}], "mac": "02:00:00:00:00:01", "bandwidth": {},
        }) else {
            unreachable!()
        };
        let previous = json!({"ips": []});
        assert_eq!(
            request(&network, &config, &capabilities, Some(&previous)),
            json!({
                "name": "net", "cniVersion": "1.0.0", "type": "portmap", "snat": true,
                "runtimeConfig": {"portMappings": [{"hostPort": 80}]}, "prevResult": {"ips": []},
            })
        );
    }
}
