package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"keybroker/internal/daemon"
	"keybroker/internal/policy"
)

func escape(s string) string { return url.PathEscape(s) }

// explainFlags are the flags of explain. Those of evidence ask another question than the others.
type explainFlags struct {
	who      callerFlags
	asJSON   bool
	evidence evidenceFlags
}

func newExplainCommand(g *globals) *cobra.Command {
	f := &explainFlags{}
	c := &cobra.Command{
		Use:   "explain VM|SERVICE | explain --evidence FILE",
		Short: "Say which rule decides about a VM, a service or an SNP report, and why; releases nothing",
		Long: `Say which rule decides about a virtual machine (by name or UUID) or about a service, and why. Nothing is released.
A name is that of a VM if one has it, and with --uid, --unit or --via that of a service. These say who would ask and how; without
--uid it is the user that runs this command. Exit status 1 when it would be refused.

` + evidenceHelp,
		Args: func(c *cobra.Command, args []string) error {
			if f.evidence.asked() {
				return cobra.NoArgs(c, args)
			}
			return cobra.ExactArgs(1)(c, args)
		},
		ValidArgsFunction: g.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.evidence.asked() {
				return g.explainEvidence(f.evidence, f.asJSON)
			}
			query, err := f.who.query(cmd.Flags().Changed)
			if err != nil {
				return usageError{err}
			}
			query.Set("of", args[0])
			return g.explainPeer(cmd.Context(), query, f.asJSON)
		},
	}
	c.Flags().Int64Var(&f.who.uid, "uid", 0, "user `ID` of the service that would ask (default: this command's own)")
	c.Flags().StringVar(&f.who.unit, "unit", "", "cgroup `PATH` of the service that would ask, such as /system.slice/db.service")
	c.Flags().StringVar(&f.who.via, "via", policy.ViaUnix, "the `DOOR` that it would come through: unix or tcp")
	c.RegisterFlagCompletionFunc("via", cobra.FixedCompletions(doors, cobra.ShellCompDirectiveNoFileComp))
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	f.evidence.add(g, c)
	return c
}

// explainPeer asks the broker about a VM or a service.
func (g *globals) explainPeer(ctx context.Context, query url.Values, asJSON bool) error {
	var e daemon.Explanation
	if err := g.ask(ctx, http.MethodGet, "/v1/explain?"+query.Encode(), &e); err != nil {
		return err
	}
	if asJSON {
		if err := writeJSON(g.stdout, e); err != nil {
			return err
		}
	} else {
		for _, line := range e.Lines {
			fmt.Fprintln(g.stdout, g.here(line))
		}
	}
	if !e.Allow {
		return errSilent
	}
	return nil
}

// callerFlags say who would ask for a service's key.
type callerFlags struct {
	uid       int64
	unit, via string
}

var doors = []string{policy.ViaUnix, policy.ViaTCP}

// query is what the broker is asked: only what was said, since a VM has none of it.
func (f *callerFlags) query(said func(flag string) bool) (url.Values, error) {
	q := url.Values{}
	if said("uid") {
		if f.uid < 0 || f.uid >= math.MaxUint32 {
			return nil, fmt.Errorf("--uid: expected the number of a user, 0 to %d, got %d", uint32(math.MaxUint32-1), f.uid)
		}
		q.Set("uid", strconv.FormatInt(f.uid, 10))
	}
	if said("unit") {
		if !strings.HasPrefix(f.unit, "/") {
			return nil, fmt.Errorf("--unit: expected the path of a cgroup such as /system.slice/db.service, got %q", f.unit)
		}
		q.Set("unit", f.unit)
	}
	if said("via") {
		if !slices.Contains(doors, f.via) {
			return nil, fmt.Errorf("--via: expected unix or tcp, got %q", f.via)
		}
		q.Set("via", f.via)
	}
	return q, nil
}

func newPolicyCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Check the policy before it is in force"}
	check := &cobra.Command{
		Use:   "check",
		Short: "Read policy.toml and its drop-ins, say what they allow, and warn of weak rules; look at broker.toml too",
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
			if cfg, _, err := g.load(); err != nil {
				g.warn("broker.toml: %s", errorLine(err))
			} else {
				for _, w := range cfg.Warnings() {
					g.warn("broker.toml: %s", w)
				}
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
	now := time.Now()
	for i, a := range p.Appraisals(now) {
		if i == 0 {
			fmt.Fprintln(g.stdout)
		}
		if err := printAppraisal(g.stdout, a); err != nil {
			return err
		}
		fmt.Fprintln(g.stdout)
	}
	for _, w := range policy.Check(p, now) {
		g.warn("%s", w)
	}
	fmt.Fprintf(g.stdout, "digest %s\n", p.Digest())
	return nil
}

// printAppraisal writes what reports must say for some VMs.
func printAppraisal(w io.Writer, a policy.Appraisal) error {
	fmt.Fprintf(w, "%s: reports for %s\n", a.Rule, cmp.Or(strings.Join(a.VMs, ", "), "no VM"))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range a.Rows {
		fmt.Fprintf(t, "  %s\t%s\n", row[0], row[1])
	}
	return t.Flush()
}
