package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"

	"keybroker/hypervisor"
	"keybroker/internal/plain"
)

const (
	// hookBudget is how long the hook may take from the start of its process on. While it runs libvirt answers nobody.
	hookBudget = hypervisor.HookLife - 100*time.Millisecond
	// hookWords is how many arguments libvirt gives: name, operation, suboperation, extra.
	hookWords = 4
	// maxHookAnswer bounds the broker's answer.
	maxHookAnswer = 4096
)

func newHookCommand(g *globals) *cobra.Command {
	hook := &cobra.Command{
		Use:   "hook",
		Short: "Tell the broker what a hypervisor does (for the hypervisor to call)",
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	hook.AddCommand(newHookQEMUCommand(g))
	return hook
}

// newHookQEMUCommand makes the command that libvirt calls. Its exit status decides over VMs, so nothing but a refusal may end
// it with another than 0: flags are taken by hand, since a domain's name may look like one.
func newHookQEMUCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "qemu NAME OPERATION SUBOPERATION EXTRA",
		Short: "Be libvirt's hook for QEMU domains: /etc/libvirt/hooks/qemu.d/keybroker",
		Long: `Be libvirt's hook for QEMU domains. libvirt gives the arguments, and the domain's definition on stdin.

A domain without keybroker's metadata is none of its business. For the others it tells the broker, within a second. It
exits with 0 whatever happens, with one exception: when the broker itself refuses a domain at "prepare", the start fails
with the broker's reason.`,
		DisableFlagParsing: true,
		Args:               cobra.ArbitraryArgs,
		PersistentPreRunE:  func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) < hookWords && slices.ContainsFunc(args, func(a string) bool { return a == "--help" || a == "-h" }) {
				return cmd.Help()
			}
			begin := g.began
			if begin == 0 {
				begin = processBegan()
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), hookBudget-(hypervisor.BootTime()-begin))
			defer cancel()
			h := &qemuHook{stdin: g.stdin, syslog: g.syslog, runDir: "/run/libvirt/qemu", begin: begin}
			h.socket = func(flags []string) (string, error) {
				if err := cmd.InheritedFlags().Parse(flags); err != nil {
					return "", err
				}
				p, err := g.paths()
				return p.HookSocket, err
			}
			return h.run(ctx, args, g.stderr)
		},
	}
}

// processBegan is when this process was started, a BootTime; if the kernel does not tell, now.
func processBegan() time.Duration {
	now := hypervisor.BootTime()
	if since, err := hypervisor.SinceStart(); err == nil && since > 0 {
		return now - since
	}
	return now
}

// qemuHook is one call by libvirt.
type qemuHook struct {
	stdin  io.Reader
	socket func(flags []string) (string, error) // the broker's, by the flags that stand before libvirt's words
	runDir string                               // where libvirt keeps NAME.pid
	syslog string                               // the system log's socket, or ""
	begin  time.Duration                        // when libvirt called, a BootTime
}

// hookRefusal is the one reason to fail.
type hookRefusal struct{ hypervisor.HookRefusal }

func (r hookRefusal) Error() string {
	return fmt.Sprintf("this VM may not start: %s (%s)", shown(r.Reason), shown(r.Code))
}

// run is the whole hook. It returns when ctx ends, even with a read of stdin still waiting, which nothing can end but the
// process's end. All it cannot do it tells in one line.
func (h *qemuHook) run(ctx context.Context, args []string, stderr io.Writer) error {
	told := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil { // at "reconnect" it would kill the VM
				told <- fmt.Errorf("internal error: %v", r)
			}
		}()
		told <- h.tell(ctx, args)
	}()
	var err error
	select {
	case err = <-told:
	case <-ctx.Done():
		err = fmt.Errorf("no answer within %v", hypervisor.HookLife)
	}
	if refusal := (hookRefusal{}); errors.As(err, &refusal) {
		return refusal
	}
	if err != nil {
		line := fmt.Sprintf("warning: hook: %s; the VM is not held up by it, the broker learns of it later", shown(err.Error()))
		fmt.Fprintf(stderr, "keybroker: %s\n", line)
		h.logWarning(line)
	}
	return nil
}

// logWait is how long the system log may keep the hook; what it does not take by then is not logged.
const logWait = 50 * time.Millisecond

// logWarning writes to the system log: libvirt drops what a hook prints that does not fail.
func (h *qemuHook) logWarning(line string) {
	if h.syslog == "" {
		return
	}
	c, err := net.DialTimeout("unixgram", h.syslog, logWait)
	if err != nil {
		return
	}
	defer c.Close()
	const daemonWarning = 3<<3 | 4 // facility and severity of syslog(3)
	c.SetWriteDeadline(time.Now().Add(logWait))
	fmt.Fprintf(c, "<%d>%s keybroker[%d]: %s", daemonWarning, time.Now().Format(time.Stamp), os.Getpid(), line)
}

// tell reads what libvirt says and passes it on to the broker. It never asks libvirt anything: that would wait for this hook.
func (h *qemuHook) tell(ctx context.Context, args []string) error {
	if len(args) < hookWords {
		return fmt.Errorf("want libvirt's arguments NAME OPERATION SUBOPERATION EXTRA, got %d", len(args))
	}
	flags, words := args[:len(args)-hookWords], args[len(args)-hookWords:]
	definition, err := io.ReadAll(io.LimitReader(h.stdin, hypervisor.MaxDomainXML+1))
	if err != nil {
		return fmt.Errorf("reading the domain's definition from stdin: %w", err)
	}
	if !bytes.Contains(definition, []byte(hypervisor.Namespace)) {
		return nil // most domains of most hosts: not a word, and nobody is asked
	}
	d, err := hypervisor.ParseDomain(definition)
	if err != nil || !d.Metadata {
		return err
	}
	if d.Name != words[0] {
		return fmt.Errorf("the definition is of %q, the call about %q", d.Name, words[0])
	}
	socket, err := h.socket(flags)
	if err != nil {
		return err
	}
	return postHook(ctx, socket, h.event(d, words))
}

func (h *qemuHook) event(d hypervisor.Domain, words []string) hypervisor.HookEvent {
	e := hypervisor.HookEvent{
		Operation: words[1], Suboperation: words[2], Extra: words[3],
		UUID: d.UUID, Name: d.Name, CID: d.CID, Tier: d.Tier, Offered: d.Offered, At: int64(h.begin),
	}
	if e.Operation == hypervisor.OpStarted || e.Operation == hypervisor.OpReconnect {
		if pid, err := hypervisor.ReadPIDFile(filepath.Join(h.runDir, d.Name+".pid")); err == nil {
			e.PID = pid // without it the broker looks for itself
		}
	}
	return e
}

// postHook sends one event. The broker's refusal is an error only where libvirt may act on one.
func postHook(ctx context.Context, socket string, e hypervisor.HookEvent) error {
	body, err := e.Marshal()
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/v1/hook", bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/json")
	response, err := unixServer(socket).do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode/100 == 2 {
		return nil
	}
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxHookAnswer))
	if err != nil {
		return fmt.Errorf("reading the broker's answer: %w", err)
	}
	var refusal hypervisor.HookRefusal
	if response.StatusCode != http.StatusForbidden || json.Unmarshal(answer, &refusal, json.RejectUnknownMembers(true)) != nil || refusal.Code == "" {
		return fmt.Errorf("the broker answered with status %d: %s", response.StatusCode, answer)
	}
	if e.Operation != hypervisor.OpPrepare {
		return fmt.Errorf("the broker refuses at %s: %s (%s)", e.Operation, refusal.Reason, refusal.Code)
	}
	return hookRefusal{refusal}
}

// shown is foreign text for libvirt's log, which has one line for it.
func shown(s string) string { return strings.TrimSpace(plain.Short(s, 500)) }
