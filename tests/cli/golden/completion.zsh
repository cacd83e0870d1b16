#compdef kvfs-admin kvfs
# completion of kvfs-admin and kvfs for zsh; load it with: source <(kvfs-admin completion zsh)
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
_kvfs_admin() {
    local word path= candidates=
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$path/$word" in
            /pool) path=/pool ;;
            /pool/create) path=/pool/create ;;
            /pool/status) path=/pool/status ;;
            /pool/list) path=/pool/list ;;
            /pool/destroy) path=/pool/destroy ;;
            /device) path=/device ;;
            /device/list) path=/device/list ;;
            /device/show) path=/device/show ;;
            /device/scan) path=/device/scan ;;
            /device/add) path=/device/add ;;
            /device/offline) path=/device/offline ;;
            /device/online) path=/device/online ;;
            /device/evacuate) path=/device/evacuate ;;
            /device/remove) path=/device/remove ;;
            /context) path=/context ;;
            /context/list) path=/context/list ;;
            /context/show) path=/context/show ;;
            /context/drop) path=/context/drop ;;
            /inspect) path=/inspect ;;
            /inspect/superblock) path=/inspect/superblock ;;
            /inspect/segment) path=/inspect/segment ;;
            /inspect/summary) path=/inspect/summary ;;
            /inspect/block) path=/inspect/block ;;
            /check) path=/check ;;
            /version) path=/version ;;
            /completion) path=/completion ;;
        esac
    done
    case "$path" in
        "") candidates="
pool device context inspect check version completion --help --pool --json
--quiet --verbose --no-color --exact --no-header
            " ;;
        "/pool") candidates="
create status list destroy --help
            " ;;
        "/pool/create") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --name
--dry-run
            " ;;
        "/pool/status") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/pool/list") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/pool/destroy") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --dry-run
--yes
            " ;;
        "/device") candidates="
list show scan add offline online evacuate remove --help
            " ;;
        "/device/list") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/device/show") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/device/scan") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --bench
            " ;;
        "/device/add") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --dry-run
            " ;;
        "/device/offline") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/device/online") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/device/evacuate") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --dry-run
            " ;;
        "/device/remove") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
--allow-data-loss --dry-run --yes
            " ;;
        "/context") candidates="
list show drop --help
            " ;;
        "/context/list") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --sort age
name size --namespace --limit
            " ;;
        "/context/show") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/context/drop") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --dry-run
--yes
            " ;;
        "/inspect") candidates="
superblock segment summary block --help
            " ;;
        "/inspect/superblock") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --hex
            " ;;
        "/inspect/segment") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --hex
            " ;;
        "/inspect/summary") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --hex
            " ;;
        "/inspect/block") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --hex
--bytes
            " ;;
        "/check") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header --data
--repair --allow-name-loss --dry-run --yes
            " ;;
        "/version") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header
            " ;;
        "/completion") candidates="
--help --pool --json --quiet --verbose --no-color --exact --no-header bash zsh
            " ;;
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _kvfs_admin kvfs-admin
_kvfs() {
    local word path= candidates=
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$path/$word" in
            /serve) path=/serve ;;
            /mount) path=/mount ;;
            /umount) path=/umount ;;
            /demo) path=/demo ;;
            /bench) path=/bench ;;
        esac
    done
    case "$path" in
        "") candidates="
serve mount umount demo bench --help --version
            " ;;
        "/serve") candidates="
--help --foreground --allow-moved --takeover --takeover-timeout --async-delay
--pinned-share --no-verify-reads --metrics --log --log-format text json
--verbose
            " ;;
        "/mount") candidates="
--help --foreground --allow-moved --takeover --takeover-timeout --async-delay
--pinned-share --no-verify-reads --metrics --log --log-format text json
--verbose --allow-other --allow-nonempty --no-passthrough --page-cache
--stay-mounted --no-core
            " ;;
        "/umount") candidates="
--help --timeout
            " ;;
        "/demo") candidates="
--help
            " ;;
        "/bench") candidates="
--help
            " ;;
    esac
    COMPREPLY=($(compgen -W "$candidates" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _kvfs kvfs
