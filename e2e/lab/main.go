// Command lab runs the project's end-to-end tests, its demonstration, a command or a shell in a hypervisor host: a virtual
// machine with systemd, libvirt, a TPM, vhost-vsock and KVM, which QEMU emulates where the machine itself has no usable KVM.
//
// It is two halves. The half that the user starts copies what the host VM needs into a folder of this run; the other, which
// sudo starts where the user is not root, makes the cached tree and runs QEMU. A pipe to the second half's standard input
// holds it alive: however the first half ends, the second ends too, and with it every process of the run.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: lab demo             show keybroker at work: the host's half of six phases, e2e/demo.sh the other
       lab test [ARG...]    run the end-to-end tests (ARGs: those of a test binary, say -test.run=Boot), in several host VMs at
                            once where the machine has the processors and the memory
       lab run COMMAND      run COMMAND as root in the host VM, with its output and its exit status
       lab shell            a root shell in the host VM
`

// exit statuses besides those of the command
const (
	exitFailed      = 1
	exitUsage       = 2
	exitNoStatus    = 125 // the host VM ended before the command did
	exitInterrupted = 130
)

func main() {
	// QEMU and the others die with the thread that started them (PR_SET_PDEATHSIG), so all are started from the main one.
	runtime.LockOSThread()
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	if len(args) > 0 && args[0] == "as-root" {
		return asRoot(args[1:])
	}
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return exitUsage
	}
	job, err := parseJob(args)
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab: error: %v\n%s", err, usage)
		return exitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	status, err := job.run(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "lab: interrupted")
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(os.Stderr, "lab: error: %v\n", err)
		return exitFailed
	}
	return status
}

// job is one run of the lab.
type job struct {
	mode     string    // demo, test, run, shell
	command  string    // what bash runs in the host VM; empty for a shell
	limit    string    // longest time that the host VM may run, as time.ParseDuration reads it
	phases   int       // how many phases there are in all; the first is setup.sh's
	progress io.Writer // where phases are shown
	tests    string    // of mode test: the pattern that chooses some

	cache string // the cache folder of all runs
	dir   string // the folder of this run
}

func parseJob(args []string) (*job, error) {
	j := &job{mode: args[0], limit: "1h", phases: 3, progress: os.Stderr}
	switch j.mode {
	case "demo":
		j.command, j.limit, j.phases, j.progress = "/share/e2e/demo.sh", "10m", 6, os.Stdout
	case "test":
		var flags []string
		flags, j.tests = chosen(args[1:])
		j.command = "/share/bin/e2e.test -test.v -test.timeout=15m " + quoteAll(flags)
		j.limit, j.phases, j.progress = "45m", 4, os.Stdout
	case "run":
		if len(args) != 2 || args[1] == "" {
			return nil, errors.New("run wants one argument, the command")
		}
		j.command = args[1]
	case "shell":
		j.limit = "24h"
	default:
		return nil, fmt.Errorf("no command %q", j.mode)
	}
	return j, nil
}

func quoteAll(args []string) string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// run makes the run's folder, has the other half make the tree, fills the share and has the other half run the host VM.
func (j *job) run(ctx context.Context) (status int, err error) {
	if err := j.makeFolders(); err != nil {
		return 0, err
	}
	defer j.removeShare()

	start := time.Now()
	tree := treeDir(j.cache)
	made := !isComplete(tree)
	if made {
		phase(j.progress, 2, j.phases, "lab", "making the host's tree, once; about two minutes")
		if status, err := j.otherHalf(ctx, nil, "tree", j.cache, j.dir); err != nil || status != 0 {
			return status, err
		}
	}
	if err := j.fillShare(tree); err != nil {
		return 0, err
	}
	phase(j.progress, 2, j.phases, "lab", labLine(tree, made, time.Since(start)))
	return j.runVM(ctx, tree)
}

func labLine(tree string, made bool, elapsed time.Duration) string {
	version, _, _ := strings.Cut(filepath.Base(modulesDir(tree)), "+")
	how := "cached"
	if made {
		how = fmt.Sprintf("made in %.0f s", elapsed.Seconds())
	}
	return fmt.Sprintf("%-70s %s", "kernel "+version+", host tree", how)
}

// phase prints one line of progress.
func phase(w io.Writer, n, of int, name, text string) {
	fmt.Fprintf(w, "[%d/%d] %-11s %s\n", n, of, name, text)
}

// makeFolders makes the cache folder and the folder of this run in it, and removes those of runs that are three days old.
func (j *job) makeFolders() error {
	base, err := os.UserCacheDir()
	if err != nil {
		return fmt.Errorf("looking for the cache folder: %w", err)
	}
	j.cache = filepath.Join(base, "keybroker")
	runs := filepath.Join(j.cache, "runs")
	if err := os.MkdirAll(runs, 0o755); err != nil {
		return fmt.Errorf("making the cache folder: %w", err)
	}
	removeOld(runs, 72*time.Hour)
	j.dir, err = os.MkdirTemp(runs, time.Now().Format("20060102-150405-"))
	if err != nil {
		return fmt.Errorf("making the folder of this run: %w", err)
	}
	if err := os.Chmod(j.dir, 0o755); err != nil {
		return err
	}
	return os.Mkdir(filepath.Join(j.dir, "out"), 0o755)
}

func removeOld(runs string, age time.Duration) {
	entries, err := os.ReadDir(runs)
	if err != nil {
		return
	}
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil && time.Since(info.ModTime()) > age {
			os.RemoveAll(filepath.Join(runs, entry.Name()))
		}
	}
}

// out is the folder that the host VM writes to and that outlives the run.
func (j *job) out() string { return filepath.Join(j.dir, "out") }

// removeShare leaves of a run only what the host VM wrote, and nothing when it never started.
func (j *job) removeShare() {
	os.RemoveAll(j.share())
	os.Remove(filepath.Join(j.dir, "tree.log"))
	os.Remove(j.out())
	os.Remove(j.dir)
}
