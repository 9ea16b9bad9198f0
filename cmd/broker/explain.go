package main

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"keybroker/internal/daemon"
	"keybroker/internal/policy"
)

func escape(s string) string { return url.PathEscape(s) }

func newExplainCommand(g *globals) *cobra.Command {
	var uid int64
	var unit string
	var asJSON bool
	c := &cobra.Command{
		Use:   "explain VM|SERVICE",
		Short: "Say which rule decides about a VM or a service, and why; releases nothing",
		Long: `Say which rule decides about a virtual machine (by name or UUID) or about a service, and why. Nothing is released.
For a service, --uid and --unit say who would ask. Exit status 1 when it would be refused.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: g.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			query := url.Values{"of": {args[0]}}
			if uid >= 0 {
				query.Set("uid", strconv.FormatInt(uid, 10))
			}
			if unit != "" {
				query.Set("unit", unit)
			}
			var e daemon.Explanation
			if err := g.ask(cmd.Context(), http.MethodGet, "/v1/explain?"+query.Encode(), &e); err != nil {
				return err
			}
			if asJSON {
				if err := writeJSON(g.stdout, e); err != nil {
					return err
				}
			} else {
				for _, line := range e.Lines {
					fmt.Fprintln(g.stdout, line)
				}
			}
			if !e.Allow {
				return errSilent
			}
			return nil
		},
	}
	c.Flags().Int64Var(&uid, "uid", -1, "user id of the service that would ask")
	c.Flags().StringVar(&unit, "unit", "", "cgroup `PATH` of the service that would ask, such as /system.slice/db.service")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func newPolicyCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Check the policy before it is in force"}
	check := &cobra.Command{
		Use:   "check",
		Short: "Read policy.toml and its drop-ins, say what they allow, and warn of weak rules",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			paths, err := g.paths()
			if err != nil {
				return err
			}
			p, err := policy.Load(policy.Source{File: paths.PolicyFile, Dir: paths.PolicyDir, Required: true})
			if err != nil {
				return err
			}
			return g.printPolicy(p)
		},
	}
	c.AddCommand(check)
	return c
}

func (g *globals) printPolicy(p *policy.Policy) error {
	t := tabwriter.NewWriter(g.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KIND\tNAME\tWHO\tKEYS\tRULE")
	for _, grant := range p.Grants() {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", grant.Kind, grant.Name, grant.Who, grant.Keys, grant.Rule)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, w := range policy.Check(p) {
		g.warn("%s", w)
	}
	fmt.Fprintf(g.stdout, "digest %s\n", p.Digest())
	return nil
}
