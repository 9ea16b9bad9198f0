package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"keybroker/internal/daemon"
)

func newStatusCommand(g *globals) *cobra.Command {
	var asJSON, watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show the realm, the virtual machines and what each waits for",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !watch {
				return g.showStatus(cmd.Context(), asJSON)
			}
			return g.watchStatus(cmd.Context(), asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "show it anew every second, until interrupted")
	return c
}

func (g *globals) showStatus(ctx context.Context, asJSON bool) error {
	var s daemon.Status
	if err := g.ask(ctx, http.MethodGet, "/v1/status", &s); err != nil {
		return err
	}
	if asJSON {
		return writeJSON(g.stdout, s)
	}
	for n, line := range s.Warnings {
		s.Warnings[n] = g.here(line)
	}
	return printStatus(g.stdout, s)
}

func (g *globals) watchStatus(ctx context.Context, asJSON bool) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if !asJSON {
			fmt.Fprint(g.stdout, "\x1b[H\x1b[2J")
		}
		if err := g.showStatus(ctx, asJSON); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func writeJSON(w io.Writer, v any) error {
	octets, err := json.Marshal(v, jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", octets)
	return err
}

func printStatus(w io.Writer, s daemon.Status) error {
	fmt.Fprintf(w, "realm    %s\n", realmLine(s.Realm))
	fmt.Fprintf(w, "holder   %s\n", holderLine(s.Realm))
	for _, slot := range s.Realm.Slots {
		fmt.Fprintf(w, "slot     %s  %s  %s\n", slot.ID, slot.Kind, slot.Description)
	}
	fmt.Fprintf(w, "listen   %s\n", strings.Join(s.Listen, ", "))
	fmt.Fprintf(w, "policy   %.12s..., %s, %s, read %s ago\n", s.Policy.Digest, several(s.Policy.Services, "service"), several(s.Policy.VMs, "VM"), age(s.Policy.Loaded))
	fmt.Fprintf(w, "libvirt  %s\n", libvirtLine(s.Hypervisor))
	fmt.Fprintf(w, "audit    head %d:%s\n", s.Audit.Seq, s.Audit.Hash)
	for _, line := range s.Warnings {
		fmt.Fprintf(w, "warning  %s\n", line)
	}
	return printVMs(w, s.VMs)
}

func realmLine(r daemon.RealmStatus) string {
	id := r.ID
	if id == "" {
		id = "(never open)"
	}
	line := fmt.Sprintf("%s  %s", id, r.State)
	if strings.HasPrefix(r.Why, r.State+" ") { // locked by an administrator
		line = id + "  " + r.Why
	} else if r.Why != "" {
		line += ": " + r.Why
	}
	if r.Generations > 0 {
		line += fmt.Sprintf("  generation %d", r.Generations)
	}
	if r.OpenedBy != "" && r.State == "open" {
		line += "  by slot " + r.OpenedBy
	}
	return line
}

func holderLine(r daemon.RealmStatus) string {
	if r.HolderPID == 0 {
		return "none: the realm is not open"
	}
	line := fmt.Sprintf("process %d (%s)", r.HolderPID, r.HolderIn)
	if r.Kept {
		line += ", kept by systemd over restarts"
	}
	return line
}

func libvirtLine(l daemon.LibvirtStatus) string {
	if l.Connected {
		return "connected at " + l.Socket
	}
	return "not connected: " + l.Why
}

// printVMs writes the table of virtual machines, if there are any.
func printVMs(w io.Writer, vms []daemon.VMStatus) error {
	if len(vms) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VM\tTIER\tCID\tSTATE\tKEYS\tSINK\tAGE\tWHY")
	for _, v := range vms {
		why := v.Why
		if v.Code != "" {
			why = strings.TrimSuffix(v.Code+": "+why, ": ")
		}
		cid := "-"
		if v.CID != 0 {
			cid = fmt.Sprint(v.CID)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", cmp.Or(v.Name, v.UUID), v.Tier, cid, v.State,
			strings.Join(v.Keys, ","), strings.Join(v.Sinks, ","), age(v.Changed), why)
	}
	return t.Flush()
}

// age is how long ago t was, in one unit.
func age(t time.Time) string {
	d := time.Since(t)
	switch {
	case t.IsZero():
		return "-"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func newIdentityCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "identity",
		Short: "Print the pin that agents trust this broker by",
		Long:  "Print the realm's public key in the form that agent.toml takes: broker = [\"ed25519:...\"].",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s daemon.Status
			if err := g.ask(cmd.Context(), http.MethodGet, "/v1/status", &s); err != nil {
				return err
			}
			if s.Realm.Identity == "" {
				return hintedError{fmt.Errorf("the realm is %s: %s", s.Realm.State, s.Realm.Why), "`keybroker unlock` opens it"}
			}
			_, err := fmt.Fprintln(g.stdout, s.Realm.Identity)
			return err
		},
	}
}

func newLockCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "lock",
		Short: "Close the realm: no key is derived until a slot opens it again",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.ask(cmd.Context(), http.MethodPost, "/v1/lock", nil)
		},
	}
}

func newVMCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "vm", Short: "Show virtual machines, and allow or deny them by hand"}
	var asJSON bool
	list := &cobra.Command{
		Use: "list", Short: "List the virtual machines that run and have keybroker's metadata, and the denied ones", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			vms, err := g.vms(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(g.stdout, vms)
			}
			if len(vms) == 0 {
				_, err := fmt.Fprintln(g.stdout, "no virtual machine with keybroker's metadata runs")
				return err
			}
			return printVMs(g.stdout, vms)
		},
	}
	list.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	show := &cobra.Command{
		Use: "show VM", Short: "Show everything about one, whether it runs or not", Args: cobra.ExactArgs(1), ValidArgsFunction: g.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			var v daemon.VMStatus
			if err := g.ask(cmd.Context(), http.MethodGet, "/v1/vm/"+escape(args[0]), &v); err != nil {
				return err
			}
			return writeJSON(g.stdout, v)
		},
	}
	var create bool
	allow := g.vmChange("allow", "Give a running VM a ticket by hand, and end a denial", func() (query, done string) {
		if create {
			return "?create=1", "is allowed, and its next release may format a blank disk"
		}
		return "", "is allowed"
	})
	allow.Flags().BoolVar(&create, "create", false, "it has a new blank disk: its next release may format it")
	deny := g.vmChange("deny", "Refuse a VM every key until `vm allow`, whatever policy says", func() (query, done string) {
		return "", "is denied: it gets no key until it is allowed; what it has already it keeps while it runs"
	})
	c.AddCommand(list, show, allow, deny)
	return c
}

// vmChange changes something about a VM by a request with this query, and says what was done.
func (g *globals) vmChange(verb, short string, how func() (query, done string)) *cobra.Command {
	return &cobra.Command{
		Use: verb + " VM", Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: g.completeVM,
		RunE: func(cmd *cobra.Command, args []string) error {
			query, done := how()
			if err := g.ask(cmd.Context(), http.MethodPost, "/v1/vm/"+escape(args[0])+"/"+verb+query, nil); err != nil {
				return err
			}
			_, err := fmt.Fprintf(g.stdout, "%s %s\n", args[0], done)
			return err
		},
	}
}

func (g *globals) vms(ctx context.Context) ([]daemon.VMStatus, error) {
	var s daemon.Status
	err := g.ask(ctx, http.MethodGet, "/v1/status", &s)
	return s.VMs, err
}

func (g *globals) completeVM(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	vms, err := g.vms(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, v := range vms {
		names = append(names, v.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
