//! What a write to a table reaches: its checks, rules, triggers and defaults.

use super::{Columns, Name, Reach, RelationFact, part_of_query, scan};

impl Reach {
    /// A relation that is written to: what fires there, and what its rules and checks call.
    pub(super) fn written(&mut self, fact: &RelationFact, name: &str) {
        self.defaults(fact, name);
        if !self.seen_written.insert(fact.oid) {
            return;
        }
        if let Some(view) = &fact.view {
            // Through it, or by its triggers, the tables behind it are written.
            for word in scan(view, false).words {
                self.new_written.insert(Name::new("", &word));
            }
        }
        for check in fact.checks.iter().flatten() {
            let mut code = scan(check, false);
            // It decides whether a row may be there, not what is in it; an error on one server alone is seen.
            if let Some(why) = code.varies.take() {
                self.open(format!("a CHECK of {name}: {why}"));
            }
            self.called(&code, &format!("a CHECK of {name}"));
        }
        for rule in fact.rules.iter().flatten() {
            let action = rule.find(" DO ").and_then(|at| rule.get(at + 4..)).unwrap_or(rule);
            self.beside(format!("{name} has a rule"));
            let action = action.trim_start_matches("INSTEAD").trim_start_matches("ALSO");
            self.code(&part_of_query(action), &format!("a rule of {name}"));
        }
        let many = fact.cascade
            || self.written_many.iter().any(|table| {
                table.name == fact.name && table.schema.as_ref().is_none_or(|schema| *schema == fact.schema)
            });
        for trigger in fact.triggers.iter().flatten() {
            if trigger.deferrable || trigger.enabled != "O" {
                self.beside(format!("a trigger of {name} is deferrable, or fires on replicas"));
            }
            if trigger.deferrable {
                self.varies(format!("{name} has a deferrable trigger, which runs as late as COMMIT"));
            }
            let condition = trigger.definition.split_once(" WHEN ").and_then(|(_, rest)| rest.rsplit_once(" EXECUTE "));
            if let Some((condition, _)) = condition {
                self.called(&scan(condition, false), &format!("a trigger of {name}"));
            }
            if many {
                self.many.get_or_insert(format!("the triggers of {name} are fired by one row after the other"));
            }
            self.function(&trigger.function, Some(name));
        }
    }

    /// The defaults that an INSERT into the table needs.
    fn defaults(&mut self, fact: &RelationFact, name: &str) {
        let own =
            |table: &Name| table.name == fact.name && table.schema.as_ref().is_none_or(|schema| *schema == fact.schema);
        let inserts: Vec<Columns> =
            self.inserts.iter().filter(|(table, _)| own(table)).flat_map(|(_, columns)| columns.clone()).collect();
        for column in fact.defaults.iter().flatten() {
            let given = |columns: &Columns| match columns {
                Columns::Named(names) => names.contains(&column.name),
                Columns::First(count) => column.position <= *count,
                Columns::Unknown => false,
            };
            let needed = column.generated || fact.cascade || inserts.iter().any(|columns| !given(columns));
            if !needed {
                continue;
            }
            if column.identity {
                self.varies(format!(
                    "the identity column {} of {name} takes the next value of a sequence",
                    column.name
                ));
            }
            if let Some(expression) = &column.expression {
                self.code(&scan(expression, false), &format!("the default of {}.{}", name, column.name));
            }
        }
    }
}
