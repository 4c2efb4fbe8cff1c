//! Why a decision is what it is: every policy of the service with what it came to.

use std::{fmt, sync::Arc};

use serde::Serialize;

use super::{
    Law, Obligation, Query,
    law::Verdict,
    library::{PrincipalScope, ResourceScope},
    schema::number,
};
use crate::{
    change::PolicyId,
    record::{Outcome, Reason},
};

/// The answer to one query, with every policy that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Permit, step-up or deny.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// The operation of the service's contract that it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation: Option<Arc<str>>,
    /// The policies that decided.
    pub by: Vec<PolicyId>,
    /// What would lift the forbids.
    pub obligation: Option<Obligation>,
    /// Every policy of the service, those that applied first, then by id.
    pub policies: Vec<Considered>,
}

/// One policy and what it came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Considered {
    /// Its `@id`.
    pub id: PolicyId,
    /// Where it stands.
    pub file: Arc<str>,
    /// Whether it permits; otherwise it forbids.
    pub permits: bool,
    /// What it came to.
    pub came_to: CameTo,
}

/// What a policy came to for one query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "came_to", rename_all = "snake_case")]
pub enum CameTo {
    /// It could not be evaluated: that denies.
    Fault {
        /// What Cedar says.
        what: String,
    },
    /// It applied.
    Applied,
    /// Its scope held; one of its conditions did not.
    ConditionFalse,
    /// Its scope did not hold.
    ScopeMismatch {
        /// It is for other principals.
        principal: bool,
        /// It is for other actions.
        action: bool,
        /// It is for other resources.
        resource: bool,
    },
}

impl Law {
    /// Judges `query` as [`Law::decide`] does, and says what every policy came to.
    pub fn explain(&self, query: &Query<'_>) -> Explanation {
        let decision = self.decide(query);
        let verdict = match self.stand(query) {
            Ok(standing) => self.evaluate(&self.candidates(standing.place), standing, query),
            Err(_) => Verdict::default(),
        };
        let mut policies: Vec<Considered> = (0u32..)
            .zip(&self.policies)
            .map(|(at, policy)| {
                let came_to = if let Some((_, what)) = verdict.faults.iter().find(|(faulty, _)| *faulty == at) {
                    CameTo::Fault { what: what.clone() }
                } else if verdict.permits.contains(&at) || verdict.forbids.contains(&at) {
                    CameTo::Applied
                } else {
                    self.why_not(at, query)
                };
                Considered {
                    id: policy.parsed.id().clone(),
                    file: policy.file.clone(),
                    permits: policy.parsed.permits(),
                    came_to,
                }
            })
            .collect();
        policies.sort_by_key(|policy| match policy.came_to {
            CameTo::Fault { .. } => 0,
            CameTo::Applied => 1,
            CameTo::ConditionFalse => 2,
            CameTo::ScopeMismatch { .. } => 3,
        });
        Explanation {
            outcome: decision.outcome,
            reason: decision.reason,
            operation: decision.operation,
            by: decision.policies.to_vec(),
            obligation: decision.obligation,
            policies,
        }
    }

    fn why_not(&self, at: u32, query: &Query<'_>) -> CameTo {
        let policy = &self.policies[at as usize];
        let workload = self.workload(query.principal);
        let principal = match &policy.parsed.principal {
            PrincipalScope::Any => workload.is_some(),
            PrincipalScope::Workload(name) => workload == Some(name),
            PrincipalScope::Role(role) => self.has_role(query.principal, role),
            PrincipalScope::Never => false,
        };
        let action = number(query.action).is_some_and(|number| policy.parsed.actions.contains(number));
        let resource = policy.concerns
            && *query.service == *self.service()
            && match &policy.parsed.resource {
                ResourceScope::Operation(operation) => self.is_resource(operation, query),
                _ => true,
            };
        if principal && action && resource {
            CameTo::ConditionFalse
        } else {
            CameTo::ScopeMismatch { principal: !principal, action: !action, resource: !resource }
        }
    }
}

impl fmt::Display for CameTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault { what } => write!(f, "could not be evaluated: {what}"),
            Self::Applied => f.write_str("applied"),
            Self::ConditionFalse => f.write_str("its condition did not hold"),
            Self::ScopeMismatch { principal, action, resource } => {
                let parts = [(*principal, "principals"), (*action, "actions"), (*resource, "resources")];
                let others: Vec<&str> = parts.iter().filter(|(other, _)| *other).map(|(_, part)| *part).collect();
                write!(f, "is for other {}", others.join(" and "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::super::fixture::{Asked, law};

    #[test]
    fn every_policy_says_what_it_came_to() {
        let law = law(r#"
            @id("a-write") permit (principal in Role::"writer", action in Action::"write", resource);
            @id("b-late") forbid (principal, action, resource) when { context.time.hour > 20 };
            @id("c-one") permit (principal, action, resource == Operation::"catalog/one");
            @id("d-read") permit (principal in Role::"reader", action in Action::"read", resource in Service::"catalog");
            @id("e-other") permit (principal == Workload::"cron", action == Action::"grpc:call", resource in Service::"payments");
            @id("f-fault") permit (principal, action == Action::"http:PUT", resource) when { context.request has size && context.request.size * 9223372036854775807 > 0 };
        "#);
        let told = |asked: &Asked| {
            let explained = law.explain(&asked.query());
            let mut told =
                format!("{} {} by {:?}\n", explained.outcome.as_str(), explained.reason.as_str(), explained.by);
            for policy in &explained.policies {
                told += &format!("{} {}\n", policy.id, policy.came_to);
            }
            told
        };
        let mut all = told(&Asked::new("web", "http:GET", "/one"));
        all += &told(&Asked { size: Some(2), ..Asked::new("web", "http:PUT", "/two") });
        all += &told(&Asked::new("countersign/control", "http:GET", "/one"));
        expect![[r#"
            permit permitted by ["c-one", "d-read"]
            c-one applied
            d-read applied
            b-late its condition did not hold
            a-write is for other actions
            e-other is for other principals and actions and resources
            f-fault is for other actions
            deny policy_fault by ["f-fault"]
            f-fault could not be evaluated: integer overflow while attempting to multiply the values `2` and `9223372036854775807`
            a-write applied
            b-late its condition did not hold
            c-one is for other resources
            d-read is for other actions
            e-other is for other principals and actions and resources
            deny not_a_workload by []
            a-write is for other principals and actions
            b-late is for other principals
            c-one is for other principals
            d-read is for other principals
            e-other is for other principals and actions and resources
            f-fault is for other principals and actions
        "#]].assert_eq(&all);
    }
}
