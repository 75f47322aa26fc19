use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap()
}

#[test]
fn manifests_are_rendered_from_this_chart() {
    let source = source(root()).unwrap();
    for Manifests { path, about, .. } in &MANIFESTS {
        let text = read(path);
        let head: Vec<_> = text.lines().take(2).collect();
        assert_eq!(head, [format!("# {about}"), source.clone()], "run `cargo xtask manifests`");
    }
}

#[test]
fn a_changed_chart_is_noticed() {
    let copy = tempfile::tempdir().unwrap();
    let (chart, values) = (copy.path().join(CHART), copy.path().join(VALUES));
    fs::create_dir_all(chart.join("templates")).unwrap();
    fs::create_dir_all(values.parent().unwrap()).unwrap();
    fs::write(values, "").unwrap();
    let template = chart.join("templates/x.yaml");
    fs::write(&template, "a").unwrap();
    let before = source(copy.path()).unwrap();
    fs::write(&template, "b").unwrap();
    assert_ne!(source(copy.path()).unwrap(), before);
}

/// Every template's objects but those of the Prometheus operator and Grafana, which are optional.
#[test]
fn manifests_have_every_object_of_the_chart() {
    let mut templates = Vec::new();
    collect(&root().join(CHART).join("templates"), &mut templates).unwrap();
    let mut expected: Vec<_> = templates
        .iter()
        .filter(|path| !path.components().any(|part| part.as_os_str() == "monitoring"))
        .flat_map(|path| {
            let kinds = |line: &str| Some(line.strip_prefix("kind: ")?.to_owned());
            read(path).lines().filter_map(kinds).collect::<Vec<_>>()
        })
        .collect();
    expected.sort();
    let rendered = documents(&read("deploy/manifests/nodemesh.yaml"));
    let mut kinds: Vec<_> = rendered.iter().map(|object| text(&object["kind"])).collect();
    kinds.sort();
    assert_eq!(kinds, expected);
    for object in &rendered {
        let named = text(&object["metadata"]["name"]);
        assert!(named.starts_with("nodemesh"), "{named}");
        assert!(object["apiVersion"].is_string(), "{named}");
    }
    let uninstall = documents(&read("deploy/manifests/uninstall.yaml"));
    let names: Vec<_> = uninstall.iter().map(|object| text(&object["metadata"]["name"])).collect();
    assert_eq!(names, ["nodemesh-agent"]);
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[test]
fn chart_and_images_have_the_version_of_the_workspace() {
    let version = env!("CARGO_PKG_VERSION");
    let chart: Value = serde_saphyr::from_str(&read(format!("{CHART}/Chart.yaml"))).unwrap();
    assert_eq!((text(&chart["version"]), text(&chart["appVersion"])), {
        (version.to_owned(), version.to_owned())
    });
    for Manifests { path, .. } in &MANIFESTS {
        let manifests = read(path);
        let images: BTreeSet<_> =
            manifests.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
        assert!(!images.is_empty());
        for image in images {
            assert!(image.ends_with(&format!(":{version}\"")), "{path}: {image}");
        }
    }
}

#[test]
fn nothing_but_the_agents_has_privileges() {
    for object in documents(&read("deploy/manifests/nodemesh.yaml")) {
        let pod = &object["spec"]["template"]["spec"];
        let Some(containers) = pod["containers"].as_array() else { continue };
        for container in containers {
            let security = &container["securityContext"];
            let name = text(&container["name"]);
            assert!(security["privileged"].is_null(), "{name}");
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(security["capabilities"]["drop"][0], "ALL", "{name}");
            let added: Vec<_> = security["capabilities"]["add"]
                .as_array()
                .into_iter()
                .flatten()
                .map(text)
                .collect();
            let expected: &[&str] = match name.as_str() {
                "agent" => &["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"],
                "cni" => &["DAC_OVERRIDE"],
                _ => &[],
            };
            assert_eq!(added, expected, "{name}");
        }
    }
}

/// Helm itself checks values against the schema, but not that both name the same ones.
#[test]
fn the_schema_knows_the_values() {
    let values: Value = serde_saphyr::from_str(&read(format!("{CHART}/values.yaml"))).unwrap();
    let schema: Value = serde_json::from_str(&read(format!("{CHART}/values.schema.json"))).unwrap();
    compare("", &values, &schema);
}

fn compare(path: &str, values: &Value, schema: &Value) {
    let (Some(values), Some(properties)) = (values.as_object(), schema["properties"].as_object())
    else {
        return;
    };
    assert_eq!(schema["additionalProperties"], false, "{path}");
    // Helm adds `global`.
    let known: BTreeSet<_> = properties.keys().filter(|key| *key != "global").collect();
    assert_eq!(values.keys().collect::<BTreeSet<_>>(), known, "{path}");
    for (key, value) in values {
        compare(&format!("{path}.{key}"), value, &properties[key]);
    }
}

/// The metrics that are named in a text.
fn metrics(text: &str) -> BTreeSet<&str> {
    let not_of_a_name = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    text.split(not_of_a_name).filter(|word| word.starts_with("nodemesh_")).collect()
}

/// The metrics that the documentation names: of the control plane some without what begins all.
fn documented() -> BTreeSet<String> {
    let text =
        read("docs/operations.md") + &read("docs/control.md").replace("..._", "nodemesh_control_");
    metrics(&text).into_iter().map(str::to_owned).collect()
}

#[test]
fn dashboard_and_alerts_use_metrics_that_exist() {
    let documented = documented();
    for file in ["alerts.yaml", "dashboard.json"] {
        let text = read(format!("{CHART}/files/{file}"));
        let used = metrics(&text);
        assert!(used.len() > 10, "{file}: {used:?}");
        let unknown: Vec<_> = used.iter().filter(|name| !documented.contains(**name)).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
    assert!(!documented.contains("nodemesh_no_such_metric_total"));
}

#[test]
fn alerts_are_rules_that_say_what_to_do() {
    let alerts: Value =
        serde_saphyr::from_str(&read(format!("{CHART}/files/alerts.yaml"))).unwrap();
    let rules = alerts["groups"][0]["rules"].as_array().unwrap();
    assert!(rules.len() > 5);
    for rule in rules {
        let name = text(&rule["alert"]);
        for value in
            [&rule["expr"], &rule["annotations"]["summary"], &rule["annotations"]["description"]]
        {
            assert!(!text(value).is_empty(), "{name}");
        }
        assert!(
            ["info", "warning", "critical"].contains(&text(&rule["labels"]["severity"]).as_str())
        );
    }
}

#[test]
fn the_dashboard_is_where_people_look_for_it() {
    assert_eq!(read("deploy/grafana/nodemesh.json"), read(format!("{CHART}/files/dashboard.json")));
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana/nodemesh.json")).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10);
}
