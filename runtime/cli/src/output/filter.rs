//! Filters of lists: `--filter key=value`.

use std::collections::HashMap;
use std::str::FromStr;

use anyhow::bail;

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The property.
    pub key: String,
    /// The value that it has to have.
    pub value: String,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("a filter is KEY=VALUE".into()),
        }
    }
}

impl Filter {
    /// Whether an item passes all filters: of several with one key, one has to hold. `holds`
    /// answers for one key and value, and with nothing for a key that it does not know.
    ///
    /// # Errors
    /// A key that is not among `known`.
    pub fn pass(
        filters: &[Self],
        known: &[&str],
        holds: impl Fn(&str, &str) -> bool,
    ) -> anyhow::Result<bool> {
        if let Some(other) = filters.iter().find(|filter| !known.contains(&filter.key.as_str())) {
            bail!("--filter: `{}` is not known; there are {}", other.key, known.join(", "));
        }
        let mut keys: Vec<&str> = filters.iter().map(|filter| filter.key.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        Ok(keys.iter().all(|key| {
            let mut same = filters.iter().filter(|filter| filter.key == *key);
            // Each label is a property of its own.
            if *key == "label" {
                same.all(|filter| holds(key, &filter.value))
            } else {
                same.any(|filter| holds(key, &filter.value))
            }
        }))
    }
}

/// Whether labels have the one that a filter names: `name`, or `name=value`.
pub fn labels_match(labels: &HashMap<String, String>, wanted: &str) -> bool {
    match wanted.split_once('=') {
        Some((name, value)) => labels.get(name).is_some_and(|label| label == value),
        None => labels.contains_key(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_one_key_add_up_and_those_of_others_narrow() {
        let labels =
            HashMap::from([("app".to_owned(), "web".to_owned()), ("tier".to_owned(), String::new())]);
        let passes = |filters: &[&str]| {
            let filters: Vec<Filter> = filters.iter().map(|filter| filter.parse().unwrap()).collect();
            Filter::pass(&filters, &["status", "label"], |key, value| match key {
                "status" => value == "running",
                _ => labels_match(&labels, value),
            })
        };
        assert!(passes(&[]).unwrap());
        assert!(passes(&["status=exited", "status=running"]).unwrap());
        assert!(!passes(&["status=exited"]).unwrap());
        assert!(passes(&["label=app=web", "status=running", "label=tier"]).unwrap());
        assert!(!passes(&["label=app=web", "label=other"]).unwrap());
        assert!(passes(&["name=x"]).unwrap_err().to_string().contains("there are status, label"));
        assert!("x".parse::<Filter>().is_err() && "=x".parse::<Filter>().is_err());
    }
}
